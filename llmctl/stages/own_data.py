"""A user's own questions and answers: checked, counted, and split into rows to train on and rows to evaluate on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.data.document import Account
from llmctl.data.formats import Example, examples
from llmctl.data.shapes import Completion, Conversation, Preference
from llmctl.errors import UserError
from llmctl.files import write_atomic
from llmctl.talk import Talk

FEWEST = 8  # rows below which nothing can be learned and measured
HELD_OUT, FEWEST_HELD, MOST_HELD = 0.1, 16, 200  # share of the questions held out, and bounds of their number


def read_answers(sources: Sequence[str], columns: Mapping[str, str], flag: str, talk: Talk) -> list[Example]:
    """Every conversation and completion of some files. Says what was read.

    Args:
        columns: role -> column.
        flag: the option that named the files, for messages.

    Raises UserError: as `examples`; a record that is no question with an answer.
    """
    account = Account(noun="record")
    found = list(examples(sources, "text", account, columns=columns))
    for example in found:
        if isinstance(example.shape, Preference):
            raise UserError(
                f"{example.place}: is a pair of answers (`{example.format}`), but {flag} takes one answer a question",
                "name the file with --pairs",
            )
        if not isinstance(example.shape, Conversation | Completion):
            raise UserError(
                f"{example.place}: is no question with an answer: the record is `{example.format}`",
                "`llmctl pretrain MODEL --data FILE` trains on plain text"
                if example.format == "text"
                else "docs/data.md lists the formats",
            )
    _tell(account, sources, talk)
    return found


def read_preferences(sources: Sequence[str], columns: Mapping[str, str], talk: Talk) -> list[Example]:
    """Every preference of some files. Says what was read. Raises UserError as `examples`, and for another record."""
    account = Account(noun="pair")
    found = list(examples(sources, "text", account, columns=columns))
    for example in found:
        if not isinstance(example.shape, Preference):
            raise UserError(
                f"{example.place}: no pair of answers: the record is `{example.format}`",
                "a pair has `prompt`, `chosen` and `rejected`; docs/data.md lists the formats",
            )
    _tell(account, sources, talk)
    return found


def _tell(account: Account, sources: Sequence[str], talk: Talk) -> None:
    """What was read; the other lines name their places themselves."""
    totals, *others = account.lines()
    for line in [f"{', '.join(sources)}: {totals}", *others]:
        talk.say(line)


def refuse_few(rows: int, sources: Sequence[str]) -> None:
    """Raise UserError for data too small to learn from and to measure on."""
    if rows < FEWEST:
        raise UserError(
            f"{', '.join(sources)}: {rows} rows are too few to train on and to measure what that changed",
            f"give at least {FEWEST}; a few hundred are usual",
        )


def question(example: Example) -> str:
    """What is asked, in one line and without regard to case: two examples of one question have the same."""
    shape = example.shape
    if isinstance(shape, Completion):
        text = shape.prompt
    else:
        assert isinstance(shape, Conversation | Preference)
        turns = shape.prompt if isinstance(shape, Preference) else shape.messages
        text = " ".join(str(turn.get("content", "")) for turn in _first_turns(turns))
    return " ".join(text.split()).casefold()


def _first_turns(turns: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The user's messages before the first answer. A system prompt is often the same everywhere."""
    for turn in turns:
        if turn["role"] == "assistant":
            return
        if turn["role"] == "user":
            yield turn


def hold_out(found: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and some to evaluate on: a tenth of the questions, each with all of its answers.

    Raises UserError if all examples ask the same.
    """
    asked = list(dict.fromkeys(question(example) for example in found))
    if len(asked) < 2:
        raise UserError(
            f"{found[0].source}: all rows ask the same question, so none can be held out for evaluation",
            "name other rows with --eval",
        )
    wanted = max(round(HELD_OUT * len(asked)), min(FEWEST_HELD, len(asked) // 4), 1)
    # by a hash, so that a question stays on its side when others are added
    asked.sort(key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
    held = set(asked[: min(wanted, MOST_HELD)])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in found:
        parts[question(example) in held].append(example)
    return parts


def write_rows(file: Path, rows: Iterable[Example]) -> None:
    """Examples as lines of JSON that every stage reads as it would have read them in their own file."""
    lines = (json.dumps(_record(row), ensure_ascii=False) for row in rows)
    write_atomic(file, "".join(f"{line}\n" for line in lines))


def _record(example: Example) -> dict[str, Any]:
    shape = example.shape
    if isinstance(shape, Completion):
        return {"prompt": shape.prompt, "completion": shape.completion}
    assert isinstance(shape, Conversation)
    return {"messages": shape.messages} | ({"tools": shape.tools} if shape.tools else {})


def warnings(
    train: Sequence[Example], held: Sequence[Example], pairs: Sequence[Example], held_by: str
) -> list[str]:
    """What makes the figures of a run say less than they seem to, a sentence each.

    Args:
        held_by: how the evaluation rows are called: `--eval`, or the rows held out.
    """
    learned, measured = ({question(one) for one in rows} for rows in (train, held))
    said = []
    if both := sum(question(one) in learned for one in held):
        said.append(
            f"{both:,} of {len(held):,} rows of {held_by} ask what a training row asks: "
            "loss and exact match will look better than they are"
        )
    kinds = Counter(type(one.shape).__name__ for one in train)
    if kinds["Completion"] == len(train):
        said.append(
            "`prompt` and `completion` are raw text without a chat template, as a base model reads it; "
            "if these are questions in a chat, add --columns prompt=prompt,response=completion"
        )
    if not pairs:
        return said
    if leaked := sum(question(one) in measured for one in pairs):
        said.append(
            f"{leaked:,} of {len(pairs):,} pairs have a prompt of {held_by}: "
            "loss and exact match after dpo will look better than they are"
        )
    if not any(question(one) in learned | measured for one in pairs):
        said.append(
            f"none of the {len(pairs):,} pairs has a prompt of the answers: "
            "dpo will teach other questions than sft"
        )
    return said
