"""JSON as data must be: strict where Python's own decoder is lenient, and bounded in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from llmctl.errors import UserError

MOST_VALUES = 1_000_000  # in one record: lists, objects, and what they hold
MOST_NAMES, LONGEST_NAME = 20, 60  # keys in a message, characters in one of them
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)


def shown(name: str) -> str:
    """A key of a record as the messages print it: short, and without what does not print."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[: LONGEST_NAME + 1])
    return printable if len(printable) <= LONGEST_NAME else f"{printable[:LONGEST_NAME]}…"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key `{shown(key)}` is given twice")
            seen.add(key)
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


# Strict where Python's own is lenient: it would take the last of two equal keys, and NaN.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)


def refuse_many_values(place: str, text: str, at: int = 0) -> None:
    """Raise UserError if a long text may hold JSON of more than `MOST_VALUES` values from `at` on.

    An empty list takes two characters of text, and thirty times that in memory.
    """
    if len(text) - at <= 2 * MOST_VALUES or _marks(text, at) <= MOST_VALUES:
        return
    # what stands inside strings is no value
    bare = sum(_marks(text, end, begin) for end, begin in _between_strings(text, at))
    if bare > MOST_VALUES:
        raise UserError(
            f"{place}: the record holds more than {MOST_VALUES:,} values",
            "cut it into several records, or leave out what is not needed",
        )


def _marks(text: str, begin: int, end: int | None = None) -> int:
    return sum(text.count(mark, begin, end) for mark in "[{,")


def _between_strings(text: str, at: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of what lies between the strings of a JSON text."""
    for found in STRING.finditer(text, at):
        yield at, found.start()
        at = found.end()
    yield at, len(text)


def why_not(error: ValueError | RecursionError) -> str:
    """What the decoder has against a piece of JSON, as the messages print it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]}, column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    what = str(error)
    return "an integer of thousands of digits" if what.startswith("Exceeds the limit") else what
