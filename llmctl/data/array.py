"""A JSON array of objects, one object at a time: only the part that is being read is held."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl.data.document import Limit
from llmctl.data.strict_json import refuse_many_values, why_not
from llmctl.errors import UserError

SPACE = re.compile(r"[ \t\n\r]*")
NEAR_END = 16  # an error this close to the end of what is held may only mean that more must be read
KINDS = {"[": "a list", '"': "a string", "n": "null", "t": "a boolean", "f": "a boolean"}

MEND = "a json file holds one list of objects; mend or delete this record"
COPY = "copy or download it again"


class Array:
    """The objects of the array in `blocks` of text: (line, column, object).

    Lines count from 1. The column is where an object begins on its line, from 1, and 0 for the first
    object of a line: where each has a line of its own, the line says enough.

    Iterating raises UserError, with the line, for what is no JSON, no array, or an element that is no
    object.
    """

    def __init__(self, path: Path, blocks: Iterator[str], decoder: json.JSONDecoder, limit: Limit) -> None:
        self.path, self.blocks, self.decoder, self.limit = path, blocks, decoder, limit
        self.text, self.at = "", 0  # what is held, and where in it the reading is
        self.before = 0  # characters that were read and are no longer held
        self.line, self.line_begins = 1, 0  # of the place; the latter in characters of the file
        self.record_line = 0  # the line on which the last object began

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        self._open()
        after = "["
        while (found := self._peek()) != "]":
            if found != "{":
                raise self._not_an_object(found)
            line, column = self.line, self._column()
            value = self._take()
            self.record_line = line
            yield line, column, value
            after = self._peek()
            if after == ",":
                self.at += 1
            elif after != "]":
                raise self._no_comma(after)
        if after == ",":
            raise self._error("a comma with no record after it", "delete the comma")
        self.at += 1
        if self._peek():
            raise self._error("something follows the closing `]`", "a json file holds one list of objects")

    def _open(self) -> None:
        found = self._peek()
        if not found:
            raise UserError(f"{self.path}: nothing but white space", "check how it was made, or leave it out")
        if found != "[":
            begins = "an object" if found == "{" else f"`{found}`"
            raise self._error(
                f"the file begins with {begins}, not with a list",
                "a json file holds a list of objects; one with an object a line is called .jsonl",
            )
        self.at += 1

    def _peek(self) -> str:
        """The next character that is not white space, to which the place moves; empty at the end."""
        while True:
            self._move(SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._hold_more():
                return ""

    def _take(self) -> dict[str, Any]:
        """The object that begins at the place, which moves behind it."""
        while True:
            try:
                value: dict[str, Any]
                refuse_many_values(f"{self.path}:{self.line}", self.text, self.at)
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self.text) - NEAR_END or error.msg.startswith("Unterminated string")
                if cut_off and self._hold_more():
                    continue
                raise self._bad_json(error) from None
            except (ValueError, RecursionError) as error:
                raise self._error(f"invalid JSON ({why_not(error)})", MEND) from None
            if end - self.at > self.limit.bytes:
                raise self.limit.exceeded(f"{self.path}:{self.line}", "the record")
            self._move(end)
            return value

    def _move(self, to: int) -> None:
        new_lines = self.text.count("\n", self.at, to)
        if new_lines:
            self.line += new_lines
            self.line_begins = self.before + self.text.rfind("\n", self.at, to) + 1
        self.at = to

    def _hold_more(self) -> bool:
        """Hold at least twice what is not yet read, so that a long record is not tried too often.

        Raises UserError if that is more than one record may take.
        """
        held = [self.text[self.at :]]
        if len(held[0]) > self.limit.bytes:
            raise self.limit.exceeded(f"{self.path}:{self.line}", "the record")
        size, wanted = 0, max(1, len(held[0]))
        while size < wanted:
            block = next(self.blocks, None)
            if block is None:
                break
            held.append(block)
            size += len(block)
        if size:
            self.before += self.at
            self.text, self.at = "".join(held), 0
        return size > 0

    def _column(self) -> int:
        """The column of the place if an object has begun before it on its line, else 0."""
        if self.record_line != self.line:
            return 0
        return self.before + self.at - self.line_begins + 1

    def _bad_json(self, error: json.JSONDecodeError) -> UserError:
        begins = self.line
        self._move(error.pos)
        if error.pos >= len(self.text.rstrip()):
            return self._error(f"the file ends inside the record that begins on line {begins}", COPY)
        column = self.before + self.at - self.line_begins + 1
        if error.msg.startswith("Unterminated string"):
            return UserError(
                f"{self.path}:{self.line}: the file ends inside the string that begins in column {column}",
                "a closing quote is missing, or the file is truncated",
            )
        what = f"{error.msg[:1].lower()}{error.msg[1:]}, column {column}"
        return UserError(f"{self.path}:{self.line}: invalid JSON ({what})", MEND)

    def _not_an_object(self, found: str) -> UserError:
        if not found:
            return self._error("the file ends inside the list", COPY)
        if found == ",":
            return self._error("a comma with no record before it", "delete the comma")
        what = KINDS.get(found, "a number" if found in "-0123456789" else f"`{found}`")
        return self._error(f"the list holds {what} where an object is expected", MEND)

    def _no_comma(self, found: str) -> UserError:
        if not found:
            return self._error("the file ends inside the list", COPY)
        return self._error(
            f"`{found}` where a comma or the closing `]` is expected", "put a comma between records"
        )

    def _error(self, what: str, hint: str) -> UserError:
        column = self._column()
        return UserError(f"{self.path}:{self.line}{f':{column}' if column else ''}: {what}", hint)
