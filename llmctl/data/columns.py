"""Columns under other names: a mapping the user gives, or names that are well known, as the keys of a format.

A mapping is applied before the keys of a record say what its format is, so every format can be reached. Without
one, records that fit no format are looked through for names such as `question` and `answer`; they are taken only
where one column may be the prompt and one the answer, and the account says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from llmctl.recipe.columns import as_option

PAIR = ("chosen", "rejected")
OPTIONAL = ("system", "input", "history", "tools")  # what a record may lack though its column is named

# Names by which data sets on the hub call a prompt and its answer: `question`, `answer` (GSM8K, Natural Questions),
# `query`, `response` (MetaMathQA), `problem`, `solution` (MATH), `instruction`, `response` (Dolly), `input`, `target`.
PROMPTS = ("instruction", "question", "query", "problem", "prompt", "input")
ANSWERS = ("response", "answer", "output", "target", "solution")
GIVEN = "context"  # what Dolly and SQuAD call that which Alpaca calls `input`
SYSTEMS = ("system", "system_prompt")
# With one of these an answer may be a letter or a number that stands for a choice.
CHOICES = ("choices", "options", "label", "labels")


def known_names(value: Mapping[str, Any]) -> dict[str, str]:
    """Role -> column for a record with well-known names; empty if there is none, or more than one way to read it.

    The caller has found that the keys fit no format as they are, or at most that of `chosen` and `rejected` alone.
    """
    have = set(value)
    prompts = [name for name in PROMPTS if name in have]
    if prompts[:1] == ["instruction"] and prompts[1:] == ["input"]:
        prompts = prompts[:1]
    if len(prompts) != 1 or have.intersection(CHOICES):
        return {}
    found = {"prompt": prompts[0]}
    if have.issuperset(PAIR):
        # a transcript or a list of messages brings its prompt
        if any(not isinstance(value[name], str) or value[name].startswith("\n\nHuman:") for name in PAIR):
            return {}
        found |= {name: name for name in PAIR}
    else:
        answers = [name for name in ANSWERS if name in have]
        if len(answers) != 1 or "completion" in have:
            return {}
        found["response"] = answers[0]
    given = next((name for name in ("input", GIVEN) if name in have and name not in found.values()), None)
    if given is not None:
        found["input"] = given
    systems = [name for name in SYSTEMS if name in have]
    return found | ({"system": systems[0]} if len(systems) == 1 else {})


def keys_of(columns: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """Column -> key of a format, for the columns that have a role.

    An answer is one in a conversation, so its prompt is an `instruction`; and so is the prompt of a pair that has a
    system prompt, an input or a history beside it.
    """
    roles = set(columns) | (set(keys) - set(columns.values()))
    instruct = "response" in columns or (
        roles.issuperset(PAIR) and any(role in columns for role in ("system", "input", "history"))
    )
    meant = {"response": "output"} | ({"prompt": "instruction"} if instruct else {})
    return {column: meant.get(role, role) for role, column in columns.items()}


def renamed(value: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """A record under the keys of a format; a column that is called as one of them and has no role loses its place.

    Args:
        keys: as from `keys_of`.
    """
    taken = set(keys.values())
    return {keys.get(name, name): item for name, item in value.items() if name in keys or name not in taken}


def missing(columns: Mapping[str, str], keys: Iterable[str]) -> list[str]:
    """Columns that have a role and are not there, though a record needs them."""
    have = set(keys)
    return [column for role, column in columns.items() if role not in OPTIONAL and column not in have]


def suggested(value: Mapping[str, Any]) -> str | None:
    """A `--columns` option to try for a record of an unknown format; None if it holds no text."""
    texts = [name for name, item in value.items() if isinstance(item, str) and "," not in name]
    if len(texts) < 2:
        return _option({"text": texts[0]}) if texts else None
    if sides := _sides(texts):
        rest = [name for name in texts if name not in sides]
        return (
            _option({"prompt": _like(rest, PROMPTS, 0)} | dict(zip(PAIR, sides, strict=True)))
            if rest
            else None
        )
    prompt = _like(texts, PROMPTS, 0)
    response = _like([name for name in texts if name != prompt], ANSWERS, -1)
    labelled = isinstance(value.get("label"), bool)  # an answer that is wanted or not
    return _option({"prompt": prompt, "completion" if labelled else "response": response})


def _sides(names: list[str]) -> tuple[str, str] | None:
    """The columns of a preference, by a part of their names."""
    good = [name for name in names if any(part in name.lower() for part in ("chosen", "better", "preferred"))]
    bad = [name for name in names if any(part in name.lower() for part in ("reject", "worse"))]
    return (good[0], bad[0]) if len(good) == 1 and len(bad) == 1 and good != bad else None


def _like(names: list[str], known: tuple[str, ...], otherwise: int) -> str:
    """The first name that has one of the known ones in it; else the one at a position."""
    near = (name for part in known for name in names if part in name.lower())
    return next(near, names[otherwise])


def _option(columns: dict[str, str]) -> str:
    return f"--columns {shlex.quote(as_option(columns))}"


def said(columns: Mapping[str, str]) -> str:
    """How a file was read, for the account: "`question` is read as the prompt, `answer` as the response"."""
    first, *others = [(column, role) for role, column in columns.items() if role not in PAIR]
    return ", ".join(
        [f"`{first[0]}` is read as the {first[1]}", *(f"`{column}` as the {role}" for column, role in others)]
    )
