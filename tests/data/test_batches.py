"""Batches: a pure function of the step, every row once an epoch, labels where they belong."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from llmctl.data.batches import IGNORE, Batches, Laid, _mix, collate, eval_batches, labels_of, split_holdout
from llmctl.data.packing import Pieces, Rows, cut, pack, unpacked
from llmctl.errors import UserError

PAD = 99


def data(lengths: list[int], max_length: int = 8) -> tuple[np.ndarray, Pieces]:
    """Ids that are their own offsets, cut into pieces."""
    doc_start = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(doc_start[-1], dtype=np.uint16) + 100, cut(doc_start, max_length, "split")


def make(count: int = 23, **settings: object) -> Batches:
    ids, pieces = data([5] * count)
    options = {"max_length": 8, "batch_size": 3, "accumulation": 2, "seed": 0, "pad_id": PAD} | settings
    return Batches(Laid(ids, pieces, unpacked(len(pieces))), **options)


def firsts(step: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for batch in step for row in batch["input_ids"]]


def two_and_one() -> Rows:
    """A row of two pieces and a row of one."""
    return Rows(np.array([0, 2, 3]), np.array([0, 1, 2]))


def test_collate_packed_row_by_hand():
    ids, pieces = data([3, 2, 4])
    batch = collate(Laid(ids, pieces, two_and_one()), range(2), pad_id=PAD)
    assert batch["input_ids"].tolist() == [[100, 101, 102, 103, 104], [105, 106, 107, 108, PAD]]
    assert batch["labels"].tolist() == [[-100, 101, 102, -100, 104], [-100, 106, 107, 108, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_only_trained_places_are_labels():
    ids, pieces = data([3, 2, 4])
    trained = np.array([True, False, True, True, True, False, False, True, True])
    laid = Laid(ids, pieces, two_and_one(), trained)
    batch = collate(laid, range(2), pad_id=PAD)
    assert batch["labels"].tolist() == [[-100, -100, 102, -100, 104], [-100, -100, 107, 108, -100]]
    assert labels_of(pieces, trained).tolist() == [1, 1, 2]
    assert laid.trained_tokens == int((batch["labels"] != IGNORE).sum()) == 4


def test_collate_without_isolation_runs_over_the_row():
    ids, pieces = data([3, 2, 2])
    batch = collate(Laid(ids, pieces, two_and_one()), range(2), pad_id=PAD, isolate=False)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 101, 102, -100, 104], [-100, 106, -100, -100, -100]]


def test_a_split_document_trains_every_token_once():
    ids, pieces = data([30, 4, 17])
    rows = pack(pieces.length, 8)
    batches = Batches(Laid(ids, pieces, rows), max_length=8, batch_size=2, accumulation=1, seed=0, pad_id=PAD)
    trained = [
        int(label)
        for step in range(batches.steps_per_epoch)
        for batch in batches.step(step)
        for label in batch["labels"].flatten()
        if label != IGNORE
    ]
    assert sorted(trained) == sorted(set(range(100, 151)) - {100, 130, 134})
    assert batches.trained_tokens == len(trained)


@pytest.mark.parametrize("isolate", [True, False])
def test_labels_are_the_inputs_or_ignored_and_never_begin_a_piece(isolate):
    ids, pieces = data([3, 9, 40, 2, 6, 6])
    rows = pack(pieces.length, 16)
    (batch,) = eval_batches(Laid(ids, pieces, rows), batch_size=99, pad_id=PAD, isolate=isolate)
    kept = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not kept[batch["position_ids"] == 0].any()
    assert not kept[batch["input_ids"] == PAD].any()
    assert int(kept.sum()) == pieces.trained_tokens


def test_every_row_once_an_epoch_and_the_last_step_is_kept():
    batches = make(23)
    assert (batches.rows, batches.steps_per_epoch) == (23, 4)
    epoch = [firsts(batches.step(i)) for i in range(4)]
    assert [len(step) for step in epoch] == [6, 6, 6, 5]
    assert [len(b["labels"]) for b in batches.step(3)] == [3, 2]
    assert sorted(chain(*epoch)) == [100 + 5 * n for n in range(23)]
    second = [firsts(batches.step(i)) for i in range(4, 8)]
    assert sorted(chain(*second)) == sorted(chain(*epoch))
    assert second != epoch


def test_a_step_depends_on_its_number_only():
    forward, backward = make(), make()
    steps = range(12)
    ahead = {i: firsts(forward.step(i)) for i in steps}
    assert {i: firsts(backward.step(i)) for i in reversed(steps)} == ahead
    assert firsts(make().step(9)) == ahead[9]
    assert firsts(make(seed=1).step(0)) != ahead[0]
    with pytest.raises(ValueError, match="step -1"):
        forward.step(-1)


def test_accumulation_does_not_change_what_a_step_holds():
    one, many = make(batch_size=6, accumulation=1), make(batch_size=1, accumulation=6)
    for i in range(8):
        assert firsts(one.step(i)) == firsts(many.step(i))


def test_the_order_is_the_same_in_every_version():
    # A run resumed under other versions of the libraries must go on with the same rows.
    assert _mix(np.array([0], dtype=np.uint64))[0] == 0xE220A8397B1DCDAF  # SplitMix64's first from seed 0
    order = [(first - 100) // 5 for first in firsts(make(8, batch_size=8, accumulation=1).step(0))]
    assert order == [0, 7, 2, 5, 4, 6, 3, 1]


def test_without_shuffling_rows_come_in_order():
    batches = make(7, shuffle=False)
    for epoch in (0, 1):
        assert firsts(batches.step(2 * epoch)) + firsts(batches.step(2 * epoch + 1)) == [
            100 + 5 * n for n in range(7)
        ]


def test_shuffling_moves_rows_everywhere():
    batches = make(400, batch_size=400, accumulation=1)
    orders = np.array([firsts(batches.step(epoch)) for epoch in range(20)])
    place = np.corrcoef(np.arange(400), orders.mean(0))[0, 1]
    assert abs(place) < 0.2
    assert abs(np.corrcoef(orders)[np.triu_indices(20, 1)]).max() < 0.25


def test_rows_that_do_not_fit_are_a_bug():
    ids, pieces = data([8, 8])
    rows = pack(pieces.length, 16)
    with pytest.raises(ValueError, match="a row of 16 tokens, max_length=8"):
        Batches(Laid(ids, pieces, rows), max_length=8, batch_size=1, accumulation=1, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="no rows"):
        Batches(Laid(ids, pieces, unpacked(0)), max_length=8, batch_size=1, accumulation=1, seed=0, pad_id=0)


@pytest.mark.parametrize(("max_rows", "sizes"), [(None, [4, 4, 2]), (5, [4, 1]), (99, [4, 4, 2]), (4, [4])])
def test_eval_batches(max_rows, sizes):
    ids, pieces = data([5] * 10)
    found = list(eval_batches(Laid(ids, pieces, unpacked(10)), batch_size=4, pad_id=PAD, max_rows=max_rows))
    assert [len(batch["labels"]) for batch in found] == sizes
    assert firsts(found) == [100 + 5 * n for n in range(sum(sizes))]


# --- held-out text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "fraction", "held"), [(20, 0.01, 1), (200, 0.1, 20), (50, 0.5, 25)])
def test_whole_documents_are_held_out(documents, fraction, held):
    _, pieces = data([20] * documents)
    train, evaluation = split_holdout(pieces, fraction, seed=0)
    assert len(set(evaluation.doc)) == held
    assert not set(train.doc) & set(evaluation.doc)
    assert len(train) + len(evaluation) == len(pieces)
    assert np.array_equal(split_holdout(pieces, fraction, seed=0)[1].doc, evaluation.doc)
    if held > 1:
        assert set(split_holdout(pieces, fraction, seed=1)[1].doc) != set(evaluation.doc)
        assert evaluation.doc.max() - evaluation.doc.min() > documents // 2


def test_of_few_documents_the_tail_is_held_out():
    _, pieces = data([200] * 2)
    train, evaluation = split_holdout(pieces, 0.1, seed=0)
    assert len(evaluation) == round(0.1 * len(pieces))
    assert train.start.max() < evaluation.start.min()
    assert train.trained_tokens + evaluation.trained_tokens == pieces.trained_tokens


def test_at_least_one_piece_on_either_side_or_nothing_held_out():
    _, pieces = data([8, 8])
    for fraction in (0.001, 0.999):
        assert [len(side) for side in split_holdout(pieces, fraction, seed=0)] == [1, 1]
    assert [len(side) for side in split_holdout(pieces, 0.0, seed=0)] == [2, 0]
    with pytest.raises(UserError) as caught:
        split_holdout(pieces.take(np.array([0])), 0.1, seed=0)
    assert caught.value.message == "too little text to hold any out for evaluation: it fits in one row"
    assert "data.eval_fraction=0" in (caught.value.hint or "")
