"""How the working parts speak while they work, without knowing about terminals.

`cli/` hands in a `Talk` that draws on stderr; everything else, tests included, may use `SILENT`.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


def ending(text: str, most: int) -> str:
    """The end of a text on one line of at most `most` characters after "… ".

    A longer one begins with a word, or with a special token such as `<|im_end|>`, where there is one in its first
    half; scripts without spaces are cut between characters.
    """
    line = _on_one_line(text)
    if len(line) <= most:
        return line
    first = len(line) - most
    marks = [match.span() for match in re.finditer(r"<\|[^|\s]*\|>", line)]
    whole = next((end for start, end in marks if start < first < end), first)
    words = [match.start() for match in re.finditer(r"(?<=\s)\S", line)]
    start = min((at for at in [*words, *(start for start, _ in marks)] if at >= whole), default=whole)
    return f"… {line[start if start - first <= most // 2 else whole :]}"


def beginning(text: str, most: int) -> str:
    """The beginning of a text on one line of at most `most` characters before " …", cut after a word as `ending`."""
    line = _on_one_line(text)
    if len(line) <= most:
        return line
    space = line.rfind(" ", 0, most + 1)
    return f"{line[: space if space >= most // 2 else most].rstrip()} …"


def _on_one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class Bar(Protocol):
    """A running count of work done."""

    def advance(self, amount: float = 1, **facts: str) -> None:
        """Count `amount` more units done; `facts` are shown beside the bar, such as loss="3.21"."""


class Talk(Protocol):
    """Where a stage says what it does."""

    def say(self, text: str) -> None:
        """One line the user should see once."""

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        """Progress over `total` units (None: unknown), named in the plural: "steps", "MB", "documents"."""


class _SilentBar:
    def advance(self, amount: float = 1, **facts: str) -> None:
        return


class _Silent:
    def say(self, text: str) -> None:
        return

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        return nullcontext(_SilentBar())


SILENT: Talk = _Silent()
