"""The loop: exact resume, invariance of the loss, and what it does when numbers go bad."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

from llmctl.cli.output import duration
from llmctl.cli.progress import PlainTalk
from llmctl.data.batches import Batches, Laid
from llmctl.data.packing import cut, pack, unpacked
from llmctl.errors import CheckFailed, Interrupted, UserError
from llmctl.kernels.device import Compute
from llmctl.model import compile_blocks
from llmctl.model.checkpoint import load_weights, new_model, save_model
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import TrainSection
from llmctl.runs import METRICS
from llmctl.talk import SILENT
from llmctl.train.checkpoint import checkpoints
from llmctl.train.journal import DIVERGED
from llmctl.train.loop import Job, every, total_steps, train
from llmctl.train.losses import LOSSES, causal_lm, trained_tokens

SPEC = ModelSection(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
LENGTH = 24
FLOAT = Compute(torch.device("cpu"), torch.float32)


def text(documents: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Counting sequences with a jump: something a model can learn."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 40, documents)
    starts = random.integers(0, 31, documents)
    ids = np.concatenate([(s + np.arange(n) * 3) % 31 for s, n in zip(starts, lengths, strict=True)])
    return ids.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)])


def batches(batch_size: int = 4, accumulation: int = 1, packing: bool = True) -> Batches:
    ids, starts = text()
    pieces = cut(starts, LENGTH, "split")
    rows = pack(pieces.length, LENGTH) if packing else unpacked(len(pieces))
    return Batches(
        Laid(ids, pieces, rows),
        max_length=LENGTH,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=0,
        pad_id=0,
    )


def job(folder, *, data=None, compute=FLOAT, evaluate=None, **settings) -> Job:
    model = new_model(SPEC, seed=0)
    folder.mkdir(exist_ok=True)
    return Job(
        model,
        data or batches(),
        LOSSES["causal_lm"],
        TrainSection(**{"max_steps": 12, "threads": 1, "logging_steps": 1, **settings}),
        compute,
        folder,
        partial(save_model, model),
        partial(load_weights, model),
        evaluate,
    )


def weights(model) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_it_learns(tmp_path):
    found = train(job(tmp_path / "a", max_steps=150, learning_rate=1e-2), SILENT)
    losses = [row["loss"] for row in rows_of(tmp_path / "a")]
    assert losses[0] == pytest.approx(math.log(31), rel=0.05)
    assert found["loss"] < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_resume_is_bit_equal(tmp_path, stop_after, dtype):
    compute = Compute(torch.device("cpu"), dtype)
    whole = job(tmp_path / "whole", compute=compute)
    train(whole, SILENT)

    cut_short = job(tmp_path / "cut", compute=compute, save_steps=1)
    step = cut_short.batches.step

    def killed(index):
        if index == stop_after:
            raise RuntimeError("power cut")
        return step(index)

    cut_short.batches.step = killed
    with pytest.raises(RuntimeError, match="power cut"):
        train(cut_short, SILENT)
    again = job(tmp_path / "cut", compute=compute, save_steps=1)
    train(again, SILENT)
    for a, b in zip(weights(whole.model), weights(again.model), strict=True):
        assert torch.equal(a, b)
    one, two = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    assert [row["loss"] for row in one] == [row["loss"] for row in two]
    assert [row["step"] for row in two] == list(range(1, 13))


def test_a_resumed_run_writes_the_same_lines(tmp_path):
    """A line averages five steps, and a checkpoint is written in the middle of them: its sums go on."""
    settings = {"logging_steps": 5, "save_steps": 3, "eval_steps": 4}
    evaluate = lambda: {"loss": 1.0}  # noqa: E731
    train(job(tmp_path / "whole", evaluate=evaluate, **settings), SILENT)
    for index in (4, 8, 11):
        cut_short = job(tmp_path / "cut", evaluate=evaluate, **settings)
        step = cut_short.batches.step

        def killed(asked, at=index, step=step):
            if asked == at:
                raise RuntimeError("power cut")
            return step(asked)

        cut_short.batches.step = killed
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut_short, SILENT)
    train(job(tmp_path / "cut", evaluate=evaluate, **settings), SILENT)
    lines = [
        [
            {name: value for name, value in row.items() if name != "tokens_per_second"}
            for row in rows_of(folder)
        ]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert lines[0] == lines[1]
    assert [row["step"] for row in lines[0] if "loss" in row] == [5, 10, 12]


def test_the_bar_ends_with_the_figures_of_the_table(tmp_path):
    """Seconds are those of the whole training, and the speed that of the whole run; both go on after a resumption."""
    said = io.StringIO()
    slow = lambda: time.sleep(0.3) or {"loss": 1.0}  # noqa: E731
    for stop in (7, None):
        made = job(tmp_path / "a", evaluate=slow, save_steps=1, eval_steps=2)
        step = made.batches.step
        made.batches.step = lambda asked, stop=stop, step=step: 1 / 0 if asked == stop else step(asked)
        try:
            found = train(made, PlainTalk(said))
        except ZeroDivisionError:
            continue
    assert found["seconds"] >= 6 * 0.3
    line = next(line for line in said.getvalue().splitlines() if line.startswith("training: 12 steps in "))
    assert f" in {duration(found['seconds'])} · " in line
    assert f" · loss {found['loss']:.3f}" in line
    assert f" · tokens/s {found['tokens_per_second']:,.0f} · " in line
    pace = found["tokens"] / found["tokens_per_second"]
    assert pace < found["seconds"] - 1.5, "the speed is that of the steps alone"


def test_ctrl_c_saves_and_resumes_exactly(tmp_path):
    whole = job(tmp_path / "whole")
    train(whole, SILENT)
    stopped = job(tmp_path / "cut", save_steps=100)
    step = stopped.batches.step

    def pressed(index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(index)

    stopped.batches.step = pressed
    with pytest.raises(Interrupted) as caught:
        train(stopped, SILENT)
    assert "interrupted at step 7 of 12; the state was saved" in caught.value.message
    assert caught.value.hint == "run the same command with --resume to go on"
    assert caught.value.exit_code == 130
    again = job(tmp_path / "cut", save_steps=100)
    train(again, SILENT)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(again.model), strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def gradients(data: Batches) -> tuple[float, list[torch.Tensor], int]:
    model, micro = new_model(SPEC, seed=0), data.step(0)
    tokens = trained_tokens(micro)
    total = 0.0
    for batch in micro:
        loss = causal_lm(model, batch, tokens)
        loss.backward()
        total += float(loss.detach())
    return total, [weight.grad for weight in model.parameters()], tokens


def test_accumulation_changes_nothing():
    """1×8 and 8×1: rows of unequal length, so a mean of means would differ."""
    one = gradients(batches(8, 1, packing=False))
    eight = gradients(batches(1, 8, packing=False))
    assert one[2] == eight[2]
    assert one[0] == pytest.approx(eight[0], abs=1e-6)
    for a, b in zip(one[1], eight[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@torch.no_grad()
def test_packing_changes_no_documents_loss():
    ids, starts = text()
    model = new_model(SPEC, seed=0)
    pieces = cut(starts, LENGTH, "split")
    alone = []
    for start, length in zip(pieces.start, pieces.length, strict=True):
        x = torch.tensor(ids[start : start + length].astype(np.int64))[None]
        alone.append(float(model(x, labels=x, num_items_in_batch=1).loss))
    for packing in (True, False):
        rows = pack(pieces.length, LENGTH) if packing else unpacked(len(pieces))
        found = np.zeros(len(pieces))
        for number in range(len(rows)):
            batch = Batches(
                Laid(ids, pieces, rows),
                max_length=LENGTH,
                batch_size=1,
                accumulation=1,
                seed=0,
                pad_id=0,
                shuffle=False,
            ).step(number)[0]
            logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
            nats = torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="none")
            at = 0
            for piece in rows[number]:
                end = at + int(pieces.length[piece])
                found[piece] = nats[at : end - 1].sum()
                at = end
        np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    bad = job(tmp_path / "nan", save_steps=3)
    step = bad.batches.step

    def poisoned(index):
        if index == 7:
            with torch.no_grad():
                bad.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
        return step(index)

    bad.batches.step = poisoned
    with pytest.raises(CheckFailed) as caught:
        train(bad, SILENT)
    assert caught.value.exit_code == 3
    assert "step 8: loss is nan; the last good checkpoint is step-000006" in caught.value.message
    assert "start a new run with a lower train.learning_rate (now 0.001)" in caught.value.hint
    assert [path.name for path in checkpoints(tmp_path / "nan")] == ["step-000003", "step-000006"]
    dump = json.loads((tmp_path / "nan" / DIVERGED).read_text())
    assert dump["step"] == 8 and len(dump["input_ids"]) == 4


def test_nan_at_once_says_there_is_no_checkpoint(tmp_path):
    bad = job(tmp_path / "nan")
    with torch.no_grad():
        bad.model.lm_head.weight.fill_(math.inf)
    with pytest.raises(CheckFailed, match="step 1: loss is nan; there is no checkpoint yet"):
        train(bad, SILENT)


def test_old_checkpoints_are_deleted_and_damaged_ones_passed_over(tmp_path):
    train(job(tmp_path / "a", save_steps=2, save_total_limit=3), SILENT)
    found = checkpoints(tmp_path / "a")
    assert [path.name for path in found] == ["step-000008", "step-000010", "step-000012"]
    with open(found[-1] / "model.safetensors", "r+b") as file:
        file.truncate(100)
    (found[-2] / "state.json").unlink()
    assert checkpoints(tmp_path / "a") == found[:1]


def test_what_a_killed_save_left_is_cleared_on_resume(tmp_path):
    train(job(tmp_path / "a", max_steps=2), SILENT)
    (tmp_path / "a" / "checkpoints" / ".tmp-step-000001-abc").mkdir()
    train(job(tmp_path / "a", max_steps=4), SILENT)
    assert {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()} == {
        "step-000003",
        "step-000004",
    }


def test_checkpoint_of_another_model_is_refused(tmp_path):
    train(job(tmp_path / "a", max_steps=2), SILENT)
    other = job(tmp_path / "a", max_steps=4)
    other.load = lambda folder: None
    other.model = new_model(SPEC.model_copy(update={"num_hidden_layers": 1}), seed=0)
    with pytest.raises(UserError, match="step-000002: the checkpoint does not fit this run"):
        train(other, SILENT)


def test_evaluation_is_logged_and_returned(tmp_path):
    seen = []

    def evaluate():
        seen.append(len(seen))
        return {"loss": 1.5, "bits_per_byte": 2.5}

    found = train(job(tmp_path / "a", evaluate=evaluate, eval_steps=5), SILENT)
    assert len(seen) == 3  # steps 5, 10 and the last
    assert found["eval_loss"] == 1.5 and found["eval_bits_per_byte"] == 2.5
    assert [row["step"] for row in rows_of(tmp_path / "a") if "eval_loss" in row] == [5, 10, 12]


def test_a_metrics_line_cut_short_by_a_crash_is_dropped(tmp_path):
    train(job(tmp_path / "a", max_steps=3), SILENT)
    with open(tmp_path / "a" / METRICS, "a") as file:
        file.write('{"step": 4, "lo')
    train(job(tmp_path / "a", max_steps=5), SILENT)
    assert [row["step"] for row in rows_of(tmp_path / "a")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "per_epoch", "steps"),
    [
        ({"max_steps": 7}, 100, 7),
        ({}, 100, 100),
        ({"num_train_epochs": 2.5}, 3, 8),
        ({"num_train_epochs": 0.1}, 2, 1),
    ],
)
def test_total_steps(settings, per_epoch, steps):
    assert total_steps(TrainSection(**settings), per_epoch) == steps


def test_every():
    assert every(1000, None) == 100 and every(3, None) == 1 and every(1000, 7) == 7


def test_compiled_model_trains_the_same(tmp_path):
    torch._dynamo.reset()
    plain, compiled = job(tmp_path / "a", max_steps=6), job(tmp_path / "b", max_steps=6)
    compile_blocks(compiled.model)
    a, b = train(plain, SILENT), train(compiled, SILENT)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for mine, theirs in zip(weights(plain.model), weights(compiled.model), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], "a block should compile whole"
    # one compilation for full rows and one for a smaller last batch, forward and backward; not one a layer or step
    assert counters["stats"]["unique_graphs"] <= 2
