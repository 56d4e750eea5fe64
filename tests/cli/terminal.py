"""A terminal for tests: what a program writes becomes lines on a screen and lines that scrolled away."""

from __future__ import annotations

import re

from llmctl.cli.output import JOINERS, cell_width

SEQUENCE = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|[^\x1b]|\x1b")
STYLE = re.compile(r"\x1b\[[\d;]*m")


class Terminal:
    """Understands what an answer needs: text that wraps, CR, LF, cursor up, and erasing to the right and below.

    Attributes:
        gone: lines that scrolled away, which nothing can change any more.
        screen: the lines on it.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.gone: list[str] = []
        self.screen = [""]
        self._row = self._column = 0
        self.shows: list[str] = []  # what could be seen after each write

    def write(self, text: str) -> int:
        for found in SEQUENCE.finditer(STYLE.sub("", text)):
            count, kind, character = found[1], found[2], found[0]
            if kind == "A":
                assert self._row >= int(count or 1), "the cursor was to go above the screen"
                self._row -= int(count or 1)
            elif kind == "K":
                self._cut()
            elif kind == "J":
                self._cut()
                del self.screen[self._row + 1 :]
            elif character.startswith("\x1b[?"):
                continue  # a mode, which draws nothing
            elif character == "\r":
                self._column = 0
            elif character == "\n":
                self._feed()
            else:
                assert character.isprintable() or character in JOINERS, f"{character!r} reached the terminal"
                self._put(character)
        self.shows.append("\n".join(self.screen))
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """All of it, from the first line that scrolled away; empty ones at the end are left out."""
        return "\n".join(line.rstrip() for line in (*self.gone, *self.screen)).rstrip("\n").split("\n")

    def _put(self, character: str) -> None:
        if self._column + cell_width(character) > self.columns:
            self._feed()
        line = self.screen[self._row]
        assert cell_width(line[: self._column]) == self._column or cell_width(line) == self._column
        head = _first(line, self._column)
        self.screen[self._row] = head + character + line[len(head) + 1 :]
        self._column += cell_width(character)

    def _cut(self) -> None:
        self.screen[self._row] = _first(self.screen[self._row], self._column)

    def _feed(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self.screen):
            self.screen.append("")
        if len(self.screen) > self.rows:
            self.gone.append(self.screen.pop(0))
            self._row -= 1


def _first(line: str, columns: int) -> str:
    """The characters of a line that take the first columns."""
    used = 0
    for place, character in enumerate(line):
        if used >= columns and cell_width(character):
            return line[:place]
        used += cell_width(character)
    return line
