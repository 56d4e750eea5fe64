"""Conversations and texts as rows: every label where a plain reference puts it, every record accounted for."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.data.batches import IGNORE, collate
from llmctl.data.document import Account
from llmctl.data.formats import examples
from llmctl.errors import UserError
from llmctl.recipe.tune import SftData
from llmctl.stages.encode import Encoder, Row
from llmctl.stages.rows import TalkRows, read_rows, require_data, talk_rows
from llmctl.stages.tune import prepare_base
from llmctl.talk import SILENT
from tests.said import Said
from tests.tokenizer.talks import MARKED, byte_level
from tests.turns import assistant, user, write

PAD = 0
LENGTH = 48
Pieces = list[tuple[list[int], list[int]]]  # ids and labels


def tokenizer(template: str = "chatml"):
    made = byte_level()
    made.chat_template = MARKED[template]
    return made


TOKENIZER = tokenizer()


def talk(question: str = "Q", answer: str = "A", turns: int = 1) -> dict[str, Any]:
    return {"messages": turns * [user(question), assistant(answer)]}


def rows(files: list[Path], max_length: int = LENGTH, **data: Any) -> tuple[TalkRows, list[str]]:
    said = Said()
    sources = [str(file) for file in files]
    made = read_rows(sources, SftData(train=sources, **data), TOKENIZER, max_length, said)
    account = made.account
    assert account.read == account.kept + sum(account.counts.values())
    assert account.kept == len(np.unique(made.laid.pieces.doc))
    return made, said.lines


def refused(files: list[Path], max_length: int = LENGTH, **data: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        rows(files, max_length, **data)
    return caught.value


def of(made: TalkRows) -> Pieces:
    """Ids and labels of every piece, as collating lays them before a model."""
    found = []
    for number in range(len(made.laid.rows)):
        batch = {name: value[0] for name, value in collate(made.laid, [number], pad_id=PAD).items()}
        starts = [*np.flatnonzero(batch["position_ids"] == 0).tolist(), len(batch["input_ids"])]
        for start, end in pairwise(starts):
            found.append((batch["input_ids"][start:end].tolist(), batch["labels"][start:end].tolist()))
    return found


def plainly(found: list[Row], overlong: str | None, max_length: int) -> Pieces:
    """The same from rows, one token after the other."""
    pieces = []
    for row in [one for one in found if one.is_text] + [one for one in found if not one.is_text]:
        policy = overlong or ("split" if row.is_text else "drop")
        labels = [
            token if any(start <= at < end for start, end in row.spans) else IGNORE
            for at, token in enumerate(row.ids)
        ]
        at = 0
        while at == 0 or at < len(row.ids) - 1:
            if len(row.ids) > max_length and policy == "drop":
                break
            piece = row.ids[at : at + max_length], [IGNORE, *labels[at + 1 : at + max_length]]
            if any(label != IGNORE for label in piece[1]):
                pieces.append(piece)
            if policy == "truncate":
                break
            at += max_length - 1
    return pieces


# --- against the reference ----------------------------------------------------------------------------

words = st.integers(0, 30).map(lambda n: ("old maps " * n).strip())
some = st.integers(1, 30).map(lambda n: ("12 maps " * n).strip())
RECORDS = {
    "talks": st.lists(st.tuples(some, some, st.integers(1, 3)).map(lambda one: talk(*one)), max_size=4),
    "alpaca": st.lists(
        st.tuples(some, words, some).map(lambda one: dict(zip(("instruction", "input", "output"), one, strict=True))),
        max_size=4,
    ),
    "texts": st.lists(some.map(lambda text: {"text": text}), max_size=4),
    "completions": st.lists(
        st.tuples(words, some).map(lambda one: {"prompt": one[0], "completion": f" {one[1]}"}), max_size=4
    ),
}  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.fixed_dictionaries(RECORDS),
    overlong=st.sampled_from([None, "drop", "truncate", "split", "error"]),
    max_length=st.integers(16, 70),
    mask=st.booleans(),
)
def test_every_label_and_every_record(tmp_path, records, overlong, max_length, mask):
    files = [write(tmp_path, *made, name=f"{name}.jsonl") for name, made in records.items() if made]
    if not files:
        return
    found = list(Encoder(TOKENIZER, mask).rows(examples(files, "text", Account(noun="record"))))
    talks = [row for row in found if not row.is_text]
    long = [row for row in talks if len(row.ids) > max_length]
    wanted = plainly(found, overlong, max_length)
    given = {"overlong": overlong, "mask_prompt": mask}
    if overlong is None and len(long) > len(talks) / 10:
        assert "too many to drop unasked" in refused(files, max_length, **given).message
    elif overlong == "error" and any(len(row.ids) > max_length for row in found):
        assert "longer than max_length" in refused(files, max_length, **given).message
    elif not wanted:
        assert refused(files, max_length, **given).message.startswith("no record is left to train on (read ")
    else:
        made, _ = rows(files, max_length, packing=False, **given)
        assert of(made) == wanted
        assert made.account.read == sum(map(len, records.values()))
        assert made.laid.trained_tokens == sum(label != IGNORE for _, labels in wanted for label in labels)
        packed, _ = rows(files, max_length, **given)
        assert sorted(of(packed)) == sorted(wanted)
        assert all(packed.laid.pieces.length[row].sum() <= max_length for row in packed.laid.rows)


# --- what is too long ---------------------------------------------------------------------------------


def test_unasked_a_conversation_is_dropped_and_a_text_is_split(tmp_path):
    talks = write(tmp_path, *[talk()] * 9, talk("Q" * 99), name="talks.jsonl")
    texts = write(tmp_path, {"text": "x" * 99}, {"text": "b"}, name="texts.jsonl")
    made, said = rows([talks, texts])
    assert made.account.counts == {"longer than 48 tokens": 1}
    assert made.account.dropped == {"longer than 48 tokens": [f"{talks}:10"]}
    assert made.account.kept == 11
    assert said == [
        "formats: 10 messages, 2 text",
        "read 12 records, kept 11",
        f"dropped 1: longer than 48 tokens ({talks}:10)",
        f"split 1 document(s) longer than 48 tokens ({texts}:1)",
    ]
    assert made.manifest(["a"])["cut"]["split"] == 1


def test_more_than_a_tenth_is_not_dropped_unasked(tmp_path):
    path = write(tmp_path, *[talk()] * 17, *[talk("Q" * 99)] * 2)
    error = refused([path])
    assert error.message == (
        f"2 of 19 records are longer than 48 tokens ({path}:18, {path}:19): too many to drop unasked"
    )
    assert (
        error.hint
        == "raise data.max_length (up to the context of the model), or set data.overlong to drop or truncate"
    )
    assert rows([path], overlong="drop")[0].account.counts == {"longer than 48 tokens": 2}
    many = write(tmp_path, *[talk("Q" * 99)] * 5, name="many.jsonl")
    assert "(" + ", ".join(f"{many}:{n}" for n in (1, 2, 3)) + ", …)" in refused([many]).message
    # texts do not count: they are never dropped
    texts = write(tmp_path, *[{"text": "x"}] * 99, name="texts.jsonl")
    assert "2 of 19 records" in refused([texts, path]).message


def test_error_names_the_longest(tmp_path):
    path = write(tmp_path, talk(), talk("Q" * 50), talk("Q" * 99))
    error = refused([path], overlong="error")
    longest = len(next(iter(Encoder(TOKENIZER).rows(list(examples([path], "text", Account()))[2:]))).ids)
    assert error.message == (
        f"2 documents are longer than max_length=48; the longest, {path}:3, has {longest} tokens"
    )


def test_truncated_answers_lose_their_end_and_are_counted(tmp_path):
    path = write(tmp_path, talk("Q", "x" * 99), talk("Q" * 99, "A"), talk())
    made, said = rows([path], overlong="truncate", packing=False)
    whole = [row.ids for row in Encoder(TOKENIZER).rows(examples([path], "text", Account()))]
    lost = sum(len(ids) - LENGTH for ids in whole[:2])
    assert said[1:] == [
        "read 3 records, kept 2",
        f"dropped 1: nothing of an answer is within 48 tokens ({path}:2)",
        f"truncated 2 document(s) longer than 48 tokens, {lost} tokens lost ({path}:1, {path}:2)",
    ]
    (ids, labels), _ = of(made)
    assert ids == whole[0][:LENGTH] and labels[-1] == ids[-1]
    assert made.manifest(["a"])["cut"]["truncated"] == 2


def test_a_split_conversation_trains_every_label_once(tmp_path):
    path = write(tmp_path, talk("Q" * 60, "x" * 60, turns=2))
    made, said = rows([path], overlong="split", packing=False)
    (row,) = Encoder(TOKENIZER).rows(examples([path], "text", Account()))
    trained = [row.ids[at] for start, end in row.spans for at in range(start, end)]
    assert [label for _, labels in of(made) for label in labels if label != IGNORE] == trained
    assert len(of(made)) < -(-len(row.ids) // (LENGTH - 1))  # some piece holds nothing but a question
    assert made.account.kept == 1 and "split 1 document(s)" in said[-1]


def test_dropping_all_of_one_kind_leaves_the_other(tmp_path):
    talks = write(tmp_path, talk("Q" * 99), name="talks.jsonl")
    texts = write(tmp_path, {"text": "a b"}, name="texts.jsonl")
    made, _ = rows([talks, texts], overlong="drop")
    assert made.account.counts == {"longer than 48 tokens": 1} and len(made.laid.rows) == 1


def test_nothing_left_is_told_with_the_reasons(tmp_path):
    path = write(tmp_path, talk("Q" * 99))
    for overlong, reason in (("drop", "longer than 48"), ("truncate", "nothing of an answer is within 48")):
        error = refused([path], overlong=overlong)
        assert error.message == (
            f"no record is left to train on (read 1 record, kept 0; dropped 1: {reason} tokens ({path}:1))"
        )
        assert error.hint == "raise data.max_length (up to the context of the model), or give other data"


def test_a_text_of_one_token_is_dropped_and_counted(tmp_path):
    bare = tokenizer()
    bare.bos_token = bare.eos_token = None
    path = write(tmp_path, {"text": "x"}, {"text": "old maps"})
    for overlong in (None, "drop", "truncate"):
        made = read_rows([str(path)], SftData(overlong=overlong), bare, LENGTH, SILENT)
        assert made.account.counts == {"fewer than two tokens: nothing to predict": 1}
        assert (made.account.read, made.account.kept) == (2, 1)
    single = write(tmp_path, {"text": "x"}, name="single.jsonl")
    with pytest.raises(UserError, match="dropped 1: fewer than two tokens"):
        read_rows([str(single)], SftData(), bare, LENGTH, SILENT)


# --- what is held out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 60])
def test_whole_conversations_are_held_out(tmp_path, count):
    path = str(write(tmp_path, *[talk(f"{n}", "A " * 40, turns=2) for n in range(count)]))
    data = SftData(train=[path], eval_fraction=0.1, overlong="drop")
    kept, held = talk_rows(data, TOKENIZER, 400, 0, SILENT)
    assert held is not None
    docs = [set(part.laid.pieces.doc.tolist()) for part in (kept, held)]
    assert docs[0] | docs[1] == set(range(count)) and not docs[0] & docs[1]
    assert len(docs[1]) == max(1, round(count / 10))
    assert kept.fingerprint != held.fingerprint
    assert talk_rows(data, TOKENIZER, 400, 0, SILENT)[1].fingerprint == held.fingerprint
    whole, none = talk_rows(data.model_copy(update={"eval_fraction": 0.0}), TOKENIZER, 400, 0, SILENT)
    assert none is None and sorted(of(whole)) == sorted(of(kept) + of(held))


def test_evaluation_data_of_its_own(tmp_path):
    train, other = (str(write(tmp_path, *[talk(name)] * 9, name=f"{name}.jsonl")) for name in "ab")
    kept, held = talk_rows(SftData(train=[train], eval=[other]), TOKENIZER, LENGTH, 0, SILENT)
    assert held is not None and (kept.account.kept, held.account.kept) == (9, 9)
    assert held.places[0] == f"{other}:1"
    for part, name in ((kept, "a"), (held, "b")):
        assert TOKENIZER.decode(part.prompts(1)[0][0]).split("\n")[1] == f"{name}<|im_end|>"


def test_prompts_are_what_stands_before_the_first_answer(tmp_path):
    path = write(tmp_path, talk("Q", "A", turns=2), talk("x" * 70, "b"))
    made, _ = rows([path], overlong="split", packing=True)
    prompts = [tuple(TOKENIZER.decode(ids) for ids in one) for one in made.prompts()]
    # the second begins with a piece that has no answer in it
    assert prompts == [("<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>")]


# --- what a manifest records --------------------------------------------------------------------------


def test_the_fingerprint_changes_with_all_that_is_trained_and_nothing_else(tmp_path):
    records = [talk("Q", "x" * 60), talk("R", "B"), {**talk("S", "C")}]
    path = write(tmp_path, *records)
    same = write(tmp_path, *records, name="same.jsonl")
    more = write(tmp_path, *records, talk(), name="more.jsonl")
    answer = write(tmp_path, *records[:2], talk("S", "D"), name="answer.jsonl")
    question = write(tmp_path, *records[:2], talk("T", "C"), name="question.jsonl")
    usual = {"overlong": "truncate"}

    def fingerprint(file: Path, max_length: int = LENGTH, **given: Any) -> str:
        return rows([file], max_length, **{**usual, **given})[0].fingerprint

    first = fingerprint(path)
    assert first == fingerprint(path) == fingerprint(same) == fingerprint(path, packing=False)
    others = [
        fingerprint(more), fingerprint(answer), fingerprint(question), fingerprint(path, mask_prompt=False),
        fingerprint(path, LENGTH - 1), fingerprint(path, 400), fingerprint(path, overlong="split"),
        fingerprint(path, overlong="drop"),
    ]  # fmt: skip
    other = read_rows([str(path)], SftData(**usual), tokenizer("model-turn"), LENGTH, SILENT).fingerprint
    assert len({first, other, *others}) == len(others) + 2


def test_the_manifest_counts_what_is_trained(tmp_path):
    made, _ = rows([write(tmp_path, talk("Q", "A"), talk("R", "B"))], packing=True)
    found = made.manifest(["data"])
    assert (found["sources"], found["formats"], found["rows"]) == (["data"], {"messages": 2}, 1)
    assert found["tokens"] == sum(len(ids) for ids, _ in of(made)) and found["trained_tokens"] == 4
    assert found["account"]["read"] == 2 and found["fingerprint"] == made.fingerprint
    json.dumps(found)


def test_no_data_is_told():
    with pytest.raises(UserError, match="no data to train on"):
        require_data([], "train on")


def test_padding_that_is_the_end_token_is_said(base, tmp_path):
    """As many published models ship; without a manifest, because no run of ours was trained so."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    said: dict[str, list[str]] = {}
    for pad in ("<|pad|>", "<|eos|>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
        talking = Said()
        prepare_base(
            str(tmp_path), device="cpu", dtype="float32", template="auto", max_length=None, talk=talking
        )
        said[pad] = talking.lines
    line = "padding and end token are the same; labels are masked by place, so ends are trained all the same"
    assert line in said["<|eos|>"] and line not in said["<|pad|>"]
