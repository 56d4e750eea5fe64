"""Reading back small files that anything may have happened to: no hang, no unbounded memory, one error.

Everything that llmctl writes and reads again (run.json, metrics.jsonl, samples.jsonl, locks, indexes of shards)
goes through here. Whatever is wrong, from a named pipe to a number of 5,000 digits, is `Unreadable` with a reason.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 64 << 20  # bytes of a file that is read whole
LINE_LIMIT = 16 << 20  # bytes of a line
DEPTH = 100  # of lists and objects within each other
NUMBERS = (-(2**63), 2**64 - 1)  # what 64 bits hold, with or without a sign


class Unreadable(ValueError):
    """Why a file cannot be read, as a reason to put after its name: `not a regular file`."""


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """All of a regular file, at most `limit` bytes. Raises Unreadable, and FileNotFoundError if there is none."""
    with os.fdopen(open_regular(path), "rb") as file:
        raw = _checked_read(file, limit + 1)
    if len(raw) > limit:
        raise Unreadable(f"larger than {limit >> 20} MiB")
    return raw


def read_text(path: Path, limit: int = LIMIT) -> str:
    """As `read_bytes`, as UTF-8; a byte order mark, which some editors put first, is left out."""
    return _decoded(read_bytes(path, limit)).removeprefix("\ufeff")


def read_value(path: Path, limit: int = LIMIT) -> Any:
    """The JSON in a file. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_text(path, limit))


def parse_json(text: str, *, wide: bool = False) -> Any:
    """A JSON value that is not deeper than `DEPTH` and whose whole numbers fit into 64 bits, else Unreadable.

    `wide` lets numbers have 100 digits: transformers writes 10^30 for "no limit" into its files.
    """
    try:
        value = json.loads(text, parse_int=_wide if wide else _integer)
    except json.JSONDecodeError as error:
        raise Unreadable(f"not valid JSON ({error})") from None
    except RecursionError:
        raise Unreadable("nested too deeply") from None
    # the exact look costs more than parsing, and few files have that many brackets at all
    if text.count("[") + text.count("{") > DEPTH and _depth(value) > DEPTH:
        raise Unreadable("nested too deeply")
    return value


@dataclass
class Rows:
    """The lines of a file of JSON objects.

    Attributes:
        rows: those that can be read, in order.
        damaged: line number, counted from 1, and reason of the others.
        whole: whether the last line ends; one that does not is being written, or a crash cut it short.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[tuple[int, str]] = field(default_factory=list)
    whole: bool = True


def read_rows(path: Path, *, numbers: bool = False) -> Rows:
    """The lines of metrics.jsonl or samples.jsonl; none if there is no such file.

    Args:
        numbers: everything in a row must be a number, as in metrics.

    Raises Unreadable for what is not a regular file; a line that cannot be read only counts as damaged.
    """
    found = Rows()
    try:
        handle = open_regular(path)
    except FileNotFoundError:
        return found
    with os.fdopen(handle, "rb") as file:
        for number, line in _lines(file):
            found.whole = line.endswith(b"\n")
            if not line.strip():
                continue
            try:
                found.rows.append(parse_row(line, numbers=numbers))
            except Unreadable as error:
                found.damaged.append((number, str(error)))
    return found


def parse_row(line: bytes, *, numbers: bool = False) -> dict[str, Any]:
    """One line of such a file: an object with a whole, non-negative `step`. Raises Unreadable."""
    if len(line) > LINE_LIMIT:
        raise Unreadable(f"a line of more than {LINE_LIMIT >> 20} MiB")
    row = parse_json(_decoded(line))
    if not isinstance(row, dict):
        raise Unreadable("not a JSON object")
    step = row.get("step")
    if type(step) is not int or step < 0:
        raise Unreadable("no step" if step is None else "the step is not a whole number")
    if numbers:
        for name, value in row.items():
            if type(value) not in (int, float):
                raise Unreadable(f"{name[:40]} is not a number")
    return row


def open_regular(path: Path) -> int:
    """A handle on a regular file. A pipe is not waited for, and a device is not opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Unreadable("not a regular file")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise Unreadable("no permission to read") from None
    except (OSError, ValueError) as error:  # a loop of links, a name no file can have
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # it was changed in between
        os.close(handle)
        raise Unreadable("not a regular file")
    return handle


def _checked_read(file: Any, count: int) -> bytes:
    try:
        return bytes(file.read(count))
    except OSError as error:  # a disk that fails
        raise Unreadable(error.strerror or str(error)) from None


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line; of one that is too long only its beginning."""
    number = 0
    while line := _readline(file):
        number += 1
        yield number, line
        while len(line) > LINE_LIMIT and not line.endswith(b"\n"):
            line = _readline(file)


def _readline(file: Any) -> bytes:
    try:
        return bytes(file.readline(LINE_LIMIT + 1))
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 (byte {error.start})") from None


def _wide(digits: str) -> int:
    return int(digits) if len(digits) <= 100 else _integer(digits)


def _integer(digits: str) -> int:
    if len(digits) <= 20:
        number = int(digits)
        if NUMBERS[0] <= number <= NUMBERS[1]:
            return number
    raise Unreadable(f"a whole number of {len(digits.lstrip('-')):,} digits, more than 64 bits hold")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        if depth > DEPTH:
            break
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
