"""Preferences as pairs of rows: prompt and answers to the token, and what is dropped, cut and held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.data.document import Account
from llmctl.data.formats import Example
from llmctl.data.shapes import Preference
from llmctl.errors import UserError
from llmctl.recipe.tune import PairData
from llmctl.stages.encode import Encoder
from llmctl.stages.pairs import Pair, PairRows, encoded_pairs, fitted_pairs, pair_rows, read_pairs
from llmctl.talk import SILENT
from llmctl.tokenizer.render import Renderer
from tests.said import Said
from tests.stages.test_rows import tokenizer
from tests.turns import assistant, call, tool, user, write

TOKENIZER = tokenizer()
LENGTH = 40
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
SAME = f"chosen and rejected are the same within {LENGTH} tokens"
LONG, NO_ROOM = f"longer than {LENGTH} tokens", f"the prompt alone takes all {LENGTH} tokens"


def record(prompt: str = "Q", chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read(file: Path, max_length: int = LENGTH, **data: Any) -> tuple[PairRows, list[str]]:
    said = Said()
    made = read_pairs([str(file)], PairData(train=[str(file)], **data), TOKENIZER, max_length, said)
    account = made.account
    assert account.read == account.kept + sum(account.counts.values())
    assert account.kept == len(made.pairs)
    return made, said.lines


def refused(file: Path, **data: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(file, **data)
    return caught.value


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


# --- what a pair is -----------------------------------------------------------------------------------


def test_a_pair_is_a_prompt_and_two_answers_with_their_ends(tmp_path):
    path = write(tmp_path, record("Old map?", " yes, it is\n", "<|im_end|>"))
    made, said = read(path)
    (pair,) = made.pairs
    assert text(pair.prompt_ids) == "<s><|im_start|>user\nOld map?<|im_end|>\n<|im_start|>assistant\n"
    assert text(pair.chosen_ids) == "yes, it is<|im_end|>"
    assert text(pair.rejected_ids) == "<|im_end|><|im_end|>"
    assert pair.rejected_ids.count(END) == 1  # what the answer spells out is text
    assert pair.prompt_ids == Renderer(TOKENIZER).prompt_ids([user("Old map?")])
    assert (pair.place, pair.cut) == (f"{path}:1", 0)
    assert said == ["formats: 1 preference", "read 1 record, kept 1"]


def test_earlier_answers_belong_to_the_prompt_and_later_turns_to_the_answer():
    prompt = [user("a"), assistant("b"), user("c")]
    shape = Preference(prompt, [assistant("d"), user("e"), assistant("f")], [assistant("g")])
    (pair,) = encoded_pairs(Encoder(TOKENIZER), [Example(shape, "preference", "x", 1)])
    assert pair.prompt_ids == Renderer(TOKENIZER).prompt_ids(prompt)
    assert (
        text(pair.chosen_ids)
        == "d<|im_end|>\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf<|im_end|>"
    )
    assert text(pair.rejected_ids) == "g<|im_end|>"
    assert pair.longest == len(pair.prompt_ids) + len(pair.chosen_ids)


def test_tools_and_calls_are_part_of_a_pair():
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    shape = Preference(
        [user("?")], [assistant("", call("look")), tool("x"), assistant("y")], [assistant("z")], tools
    )
    (pair,) = encoded_pairs(Encoder(TOKENIZER), [Example(shape, "preference", "x", 1)])
    assert pair.prompt_ids == Renderer(TOKENIZER).prompt_ids([user("?")], tools)
    assert text(pair.chosen_ids).startswith(
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'
    )


def test_a_template_that_changes_the_prompt_by_the_answer_is_refused():
    """With marks and answers that all pass alone, but a prompt that is not one."""
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]"
        "{{ '!' if messages[-1].content == 'no' }}{{ m.content }}[/INST]"
        "{% else %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    shape = Preference([user("a")], [assistant("yes")], [assistant("no")])
    with pytest.raises(UserError) as caught:
        list(encoded_pairs(Encoder(made), [Example(shape, "preference", "x.jsonl", 4)]))
    assert caught.value.message == (
        "x.jsonl:4: the prompt is rendered in another way for training than for inference: "
        "`!a[/INST]n` instead of `a[/INST]`"
    )


def test_records_of_other_kinds_are_told(tmp_path):
    error = refused(write(tmp_path, {"instruction": "a", "output": "b"}))
    assert error.message.endswith("data.jsonl:1: no pair of answers: the record is `alpaca`")
    assert error.hint == "a pair has `chosen` and `rejected`; see the formats in docs/data.md"


# --- what does not fit --------------------------------------------------------------------------------

words = st.integers(1, 40).map(lambda n: "x" * n)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.builds(record, words, words, words.map(lambda text: f"{text}."))
                     | st.just(record("Q", "same", "same  ")), min_size=1, max_size=8),
    overlong=st.sampled_from([None, "drop", "truncate", "error"]),
)  # fmt: skip
def test_every_pair_is_kept_cut_or_dropped(tmp_path, records, overlong):
    """Against the rule in plain words, pair by pair."""
    path = write(tmp_path, *records)
    whole = [encoded(one) for one in records]
    long = [pair for pair in whole if pair.longest > LENGTH]
    wanted: list[tuple[list[int], ...]] = []
    reasons: dict[str, int] = {}
    for pair in whole:
        reason = None
        sides = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        if pair.longest > LENGTH:
            room = LENGTH - len(pair.prompt_ids)
            sides = pair.prompt_ids, pair.chosen_ids[: max(0, room)], pair.rejected_ids[: max(0, room)]
            reason = LONG if overlong != "truncate" else NO_ROOM if room < 1 else None
        if reason is None and sides[1] == sides[2]:
            reason = SAME
        if reason is None:
            wanted.append(sides)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if overlong is None and len(long) > len(records) / 10:
        assert "too many to drop unasked" in refused(path).message
    elif overlong == "error" and long:
        assert refused(path, overlong="error").message.startswith(
            f"{len(long)} of {len(records)} records are longer"
        )
    elif not wanted:
        assert refused(path, overlong=overlong).message.startswith("no pair is left to train on (read ")
    else:
        made, _ = read(path, overlong=overlong)
        assert [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in made.pairs] == wanted
        assert made.account.counts == reasons


def encoded(one: dict[str, str]) -> Pair:
    shape = Preference([user(one["prompt"])], [assistant(one["chosen"])], [assistant(one["rejected"])])
    return next(encoded_pairs(Encoder(TOKENIZER), [Example(shape, "preference", "x", 1)]))


def test_answers_that_differ_only_after_the_cut_are_dropped(tmp_path):
    same = record("Q", "x" * 40 + "a", "x" * 40 + "b")
    path = write(tmp_path, same, record("Q", "x" * 40, "y"), record("Q" * 40))
    made, said = read(path, overlong="truncate")
    assert made.account.dropped == {SAME: [f"{path}:1"], NO_ROOM: [f"{path}:3"]}
    (pair,) = made.pairs
    assert pair.longest == LENGTH and END not in pair.chosen_ids and pair.rejected_ids[-1] == END
    lost = len(encoded(record("Q", "x" * 40, "y")).chosen_ids) - len(pair.chosen_ids)
    assert pair.cut == lost
    assert said[-1] == f"truncated 1 record(s) longer than {LENGTH} tokens, {lost} tokens lost"
    assert made.manifest(["a"])["truncated"] == 1


def test_answers_that_the_template_makes_equal_are_dropped(tmp_path):
    path = write(tmp_path, record("Q", "yes", " yes\n"), record())
    made, _ = read(path)
    assert made.account.dropped == {SAME: [f"{path}:1"]} and len(made.pairs) == 1


def test_errors_of_length(tmp_path):
    path = write(tmp_path, *[record()] * 5, record("Q" * 60))
    error = refused(path)
    assert error.message == (
        f"1 of 6 records are longer than {LENGTH} tokens ({path}:6): too many to drop unasked"
    )
    error = refused(path, overlong="error")
    assert error.message == f"1 of 6 records are longer than {LENGTH} tokens, as {path}:6"
    assert (
        error.hint
        == "set data.overlong to drop or truncate, or raise data.max_length (up to the context of the model)"
    )
    error = refused(path, overlong="split")
    assert error.message == "data.overlong: `split` makes no sense for a pair of answers"
    assert error.hint == "use drop or truncate"
    only = write(tmp_path, record("Q" * 60), name="only.jsonl")
    error = refused(only, overlong="drop")
    assert (
        error.message == f"no pair is left to train on (read 1 record, kept 0; dropped 1: {LONG} ({only}:1))"
    )
    ten = write(tmp_path, *[record()] * 9, record("Q" * 60), name="ten.jsonl")
    assert len(read(ten)[0].pairs) == 9  # a tenth may be dropped unasked


# --- what is held out ---------------------------------------------------------------------------------


def held_out(file: Path, fraction: float, seed: int = 0) -> tuple[PairRows, PairRows | None]:
    return pair_rows(PairData(train=[str(file)], eval_fraction=fraction), TOKENIZER, LENGTH, seed, SILENT)


@pytest.mark.parametrize("prompts", [2, 5, 40])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_pairs_of_one_prompt_are_never_on_both_sides(tmp_path, prompts, fraction):
    records = [record(f"{n % prompts}", "x" * (n // prompts + 1)) for n in range(4 * prompts)]
    kept, held = held_out(write(tmp_path, *records), fraction)
    assert held is not None
    sides = [{tuple(pair.prompt_ids) for pair in part.pairs} for part in (kept, held)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == min(prompts - 1, max(1, round(prompts * fraction)))
    places = [pair.place for part in (kept, held) for pair in part.pairs]
    assert len(places) == len(set(places)) == len(records)
    assert kept.fingerprint != held.fingerprint


def test_nothing_is_held_out_if_unwanted_or_given(tmp_path):
    path, other = write(tmp_path, *[record()] * 3), write(tmp_path, record("R"), name="other.jsonl")
    kept, held = held_out(path, 0.0)
    assert held is None and len(kept.pairs) == 3
    data = PairData(train=[str(path)], eval=[str(other)])
    kept, held = pair_rows(data, TOKENIZER, LENGTH, 0, SILENT)
    assert held is not None and [len(kept.pairs), len(held.pairs)] == [3, 1]


def test_one_prompt_cannot_be_held_out(tmp_path):
    with pytest.raises(UserError) as caught:
        held_out(write(tmp_path, *[record()] * 3), 0.1)
    assert caught.value.message == "all pairs have the same prompt, so none can be held out for evaluation"
    assert caught.value.hint == (
        "give more data, name evaluation data in data.eval, or set data.eval_fraction=0"
    )


# --- what is recorded ---------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_every_id():
    def fingerprint(*pairs: Pair) -> str:
        return PairRows(list(pairs), Account(), {}, 9).fingerprint

    pair = Pair([1, 2], [3], [4], "a:1")
    assert fingerprint(pair) == fingerprint(Pair([1, 2], [3], [4], "b:2"))
    others = [
        [Pair([1], [2, 3], [4], "a:1")], [Pair([1, 2], [4], [3], "a:1")], [Pair([1, 2], [3, 4], [], "a:1")],
        [pair, pair], [], [Pair([1, 2], [3], [5], "a:1")],
    ]  # fmt: skip
    assert len({fingerprint(pair), *(fingerprint(*one) for one in others)}) == 7


def test_how_often_the_shorter_answer_is_chosen():
    pairs = [Pair([1], [1] * a, [1] * b, "x") for a, b in ((1, 2), (2, 1), (3, 3), (1, 4))]
    assert PairRows(pairs, Account(), {}, 9).shorter_wins() == (1 + 0 + 0.5 + 1) / 4


def test_formats_are_said_and_recorded():
    found = Pair([1], [2], [3], "x")
    account, encoder = Account(noun="record"), Encoder(TOKENIZER)
    encoder.formats["kto"] = 1
    account.keep()
    said = Said()
    made = fitted_pairs([found], encoder, account, PairData(), LENGTH, said)
    assert said.lines[0] == "formats: 1 kto"
    assert made.manifest(["f"])["formats"] == {"kto": 1}
