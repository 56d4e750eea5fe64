"""A JSON array of objects, one object at a time: only the part that is being read is held."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl.errors import UserError

SPACE = re.compile(r"[ \t\n\r]*")
NEAR_END = 16  # an error this close to the end of what is held may only mean that more must be read
KINDS = {"[": "a list", '"': "a string", "n": "null", "t": "a boolean", "f": "a boolean"}

MEND = "a json file holds one list of objects; mend or delete this record"
COPY = "copy or download it again"


class Array:
    """The objects of the array in `blocks` of text, and the line on which each begins.

    Iterating raises UserError, with the line, for what is no JSON, no array, or an element that is no
    object.
    """

    def __init__(self, path: Path, blocks: Iterator[str], decoder: json.JSONDecoder) -> None:
        self.path, self.blocks, self.decoder = path, blocks, decoder
        self.text, self.at, self.line = "", 0, 1  # what is held, where it is read, the line of that place
        self.whole = False  # whether all that is left is held

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self._open()
        after = "["
        while (found := self._peek()) != "]":
            if found != "{":
                raise self._not_an_object(found)
            yield self.line, self._take()
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
        """The next character that is not white space, which becomes the place; empty at the end."""
        while True:
            end = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text):
                return self.text[end]
            if not self._hold_more():
                return ""

    def _take(self) -> dict[str, Any]:
        """The object that begins at the place, which moves behind it."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self.text) - NEAR_END or error.msg.startswith("Unterminated string")
                if cut_off and self._hold_more():
                    continue
                raise self._bad_json(error, cut_off) from None
            except (ValueError, RecursionError) as error:
                raise self._error(f"invalid JSON ({why_not(error)})", MEND) from None
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return value

    def _hold_more(self) -> bool:
        """Hold at least twice what is not yet read, so that a long record is not tried too often."""
        if self.whole:
            return False
        held = [self.text[self.at :]]
        size, wanted = 0, max(1, len(held[0]))
        while size < wanted:
            block = next(self.blocks, None)
            if block is None:
                self.whole = True
                break
            held.append(block)
            size += len(block)
        self.text, self.at = "".join(held), 0
        return size > 0

    def _bad_json(self, error: json.JSONDecodeError, cut_off: bool) -> UserError:
        begins = self.line
        self.line += self.text.count("\n", self.at, error.pos)
        if cut_off and error.pos >= len(self.text.rstrip()):
            return self._error(f"the file ends inside the record of line {begins}", COPY)
        return self._error(f"invalid JSON ({why_not(error)}) in the record of line {begins}", MEND)

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
        return UserError(f"{self.path}:{self.line}: {what}", hint)


def why_not(error: ValueError | RecursionError) -> str:
    """What the decoder has against a piece of JSON, as the messages print it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]}, column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    what = str(error)
    return "an integer of thousands of digits" if what.startswith("Exceeds the limit") else what
