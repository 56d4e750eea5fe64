"""The quickstart on one's own data: settings by size, which rows are held out, and what is warned of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation, Preference, Shape
from llmctl.errors import UserError
from llmctl.recipe.rates import chosen_rate
from llmctl.stages.own_data import hold_out, question, warnings
from llmctl.stages.own_plan import RAISED, Sizes, about, choose, lines, row_length

SIZES = Sizes(
    rows=400,
    tokens=28_000,
    trained_tokens=6_000,
    longest=87,
    held=60,
    held_tokens=4_000,
    pairs=180,
    pair_tokens=30_000,
    longest_pair=90,
    parameters=135_000_000,
    limit=2048,
    device="cpu",
    seconds_per_token=0.01,
)


def test_small_data() -> None:
    found = choose(SIZES, None)
    assert (found.max_length, found.dpo_length, found.rank, found.epochs) == (128, 128, 8, 3)
    assert found.batch * found.accumulation == round(3 * 28_000 / 100 / 128)
    assert 90 <= found.steps <= 110 and found.max_steps is None and found.dpo_max_steps is None
    assert found.dpo_steps == 45
    assert found.dpo()["train.learning_rate"] == RAISED * chosen_rate("dpo", "lora", SIZES.parameters)
    assert found.train_seconds == pytest.approx(0.01 * (3 * 28_000 + 1.7 * 30_000))
    assert found.sft()["train.num_train_epochs"] == 3 and found.sft()["train.max_steps"] is None


def test_large_data() -> None:
    large = replace(
        SIZES, rows=100_000, tokens=30_000_000, trained_tokens=20_000_000, longest=3_000, pairs=50_000
    )
    found = choose(large, None)
    assert (found.max_length, found.epochs, found.rank) == (2048, 1, 32)
    assert (found.batch, found.accumulation) == (1, 8)  # 16,384 tokens a step, 2,048 of them in memory
    assert (found.dpo_accumulation, found.dpo()["train.learning_rate"]) == (2, None)
    on_gpu = choose(replace(large, device="cuda"), None)
    assert (on_gpu.batch, on_gpu.accumulation) == (8, 1)


def test_minutes_bound_both_trainings() -> None:
    whole = choose(SIZES, None)
    found = choose(SIZES, 5)
    share = 300 / whole.train_seconds
    assert found.train_seconds == pytest.approx(300)
    assert found.max_steps == found.steps == int(share * whole.steps)
    assert found.dpo_max_steps == int(share * whole.dpo_steps)
    assert found.sft()["train.num_train_epochs"] is None
    assert choose(SIZES, 1e9) == whole
    least = choose(SIZES, 1e-9)
    assert (least.max_steps, least.dpo_max_steps) == (1, 1)
    assert choose(replace(SIZES, pairs=0, pair_tokens=0), 1e-9).dpo_max_steps is None


def test_settings_are_said_with_their_reasons() -> None:
    said = lines(SIZES, choose(SIZES, None), None)
    assert said[0] == (
        "data: 400 rows to train on, 28,000 tokens (6,000 of answers), the longest 87; "
        "60 rows to evaluate on; 180 pairs"
    )
    assert said[1] == "max_length 128: the longest row; shorter ones are packed together"
    assert said[4] == (
        "lora.r 8: 6,000 tokens of answers; learning rate of sft 5e-4: the usual one for 135,000,000 parameters"
    )
    assert said[5] == "dpo: 45 steps at a rate of 5e-5: at the usual one so few would change nothing"
    assert said[-1].startswith("time on this machine: about 22 minutes to train, about ")
    bounded = lines(SIZES, choose(SIZES, 5), 5)
    assert bounded[3].endswith("steps (bounded by --minutes 5), 0.7 of 3 epochs")
    slow = replace(SIZES, seconds_per_token=0.1)
    assert lines(slow, choose(slow, None), None)[-1] == "--minutes N bounds the training"
    cut = replace(SIZES, longest=5_000)
    assert "cut at the model's limit of 2,048" in lines(cut, choose(cut, None), None)[1]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (5, "less than a minute"),
        (61, "about 1 minute"),
        (600, "about 10 minutes"),
        (4 * 3600, "about 4 hours"),
    ],
)
def test_about(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_row_length() -> None:
    assert [row_length(longest, 2048) for longest in (1, 128, 129, 500, 9999)] == [128, 128, 192, 512, 2048]
    assert row_length(10, 64) == 64


# --- rows --------------------------------------------------------------------------------------------


def example(shape: Shape, line: int = 1) -> Example:
    return Example(shape, "messages", "x.json", line)


def talks(asked: Iterable[object]) -> list[Example]:
    turns = ([{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}] for n in asked)
    return [example(Conversation(messages)) for messages in turns]


def pair(asked: object) -> Example:
    said = [[{"role": "assistant", "content": word}] for word in ("Yes.", "No.")]
    return example(Preference([{"role": "user", "content": f"{asked}?"}], *said))


@pytest.mark.parametrize(("count", "held"), [(8, 2), (40, 10), (64, 16), (400, 40), (9_000, 200)])
def test_how_many_are_held_out(count: int, held: int) -> None:
    kept, apart = hold_out(talks(range(count)), 0)
    assert len(apart) == held and len(kept) == count - held


def test_answers_to_one_question_stay_together() -> None:
    kept, apart = hold_out(talks([n // 3 for n in range(60)]), 0)
    assert not {question(one) for one in kept} & {question(one) for one in apart}
    assert len(apart) % 3 == 0


def test_a_question_stays_on_its_side() -> None:
    before = {question(one) for one in hold_out(talks(range(400)), 0)[1]}
    after = {question(one) for one in hold_out(talks(range(410)), 0)[1]}
    assert len(before & after) >= 38
    assert {question(one) for one in hold_out(talks(range(400)), 1)[1]} != before


def test_one_question_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match=r"x\.json: all rows ask the same question") as raised:
        hold_out(talks([1] * 9), 0)
    assert raised.value.hint == "name other rows with --eval"


def test_questions_are_compared_without_case_and_space() -> None:
    one, other = (example(Completion(text, "x")) for text in ("What  is\nIT? ", "what is it?"))
    assert question(one) == question(other)


def test_warnings() -> None:
    train, held = talks(range(10)), talks(range(8, 12))
    assert warnings(train, talks([20]), [pair(3)], "--eval") == []
    assert warnings(train, held, [], "--eval") == [
        "2 of 4 rows of --eval ask what a training row asks: loss and exact match will look better than they are"
    ]
    assert warnings(train, talks([20]), [pair(20), pair(1)], "the rows held out") == [
        "1 of 2 pairs have a prompt of the rows held out: "
        "loss and exact match after dpo will look better than they are"
    ]
    assert warnings(train, talks([20]), [pair(77)], "--eval") == [
        "none of the 1 pairs has a prompt of the answers: dpo will teach other questions than sft"
    ]
    raw = [example(Completion(f"{n}", "x")) for n in range(9)]
    (said,) = warnings(raw, talks([20]), [], "--eval")
    assert said.endswith("if these are questions in a chat, add --columns prompt=prompt,response=completion")
