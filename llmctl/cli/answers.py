"""How an answer is shown while it comes: as JSON, as the text it is, or as Markdown on a terminal."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol, TextIO

from llmctl.cli.output import can_draw, harmless, json_text

if TYPE_CHECKING:
    from llmctl.stages.chat import Exchange

LEAST_PAUSE = 0.04  # seconds between two drawings
MOST_SHARE = 0.1  # of the time may go into drawing


class Answer(Protocol):
    """One answer on its way to stdout."""

    def add(self, text: str) -> None:
        """More of it."""

    def end(self, exchange: Exchange | None) -> None:
        """It is complete; None if it failed, and what is shown is all there is."""


def answer_for(stream: TextIO, as_json: bool) -> Answer:
    """The way that suits a stream."""
    if as_json:
        return JsonAnswer(stream)
    return DrawnAnswer(stream) if can_draw(stream) else PlainAnswer(stream)


class JsonAnswer:
    """A line a exchange, once it is complete."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def add(self, text: str) -> None:
        return

    def end(self, exchange: Exchange | None) -> None:
        if exchange is not None:
            self._stream.write(json_text(asdict(exchange)) + "\n")
            self._stream.flush()


class PlainAnswer:
    """The text as it comes. A pipe gets it as it is; on a terminal, nothing in it can move the cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._raw = stream, not stream.isatty()
        self._any = False

    def add(self, text: str) -> None:
        self._any = True
        self._stream.write(text if self._raw else harmless(text))
        self._stream.flush()

    def end(self, exchange: Exchange | None) -> None:
        if exchange is not None or self._any:
            self._stream.write("\n")
            self._stream.flush()


class DrawnAnswer:
    """Markdown, drawn again as it grows.

    Only the block that is still being written is drawn again, and of it only what fits on the screen. What is
    complete is written once and never touched again, so an answer may be longer than the screen.
    """

    def __init__(self, stream: TextIO) -> None:
        # here, because rich takes a while to import
        from llmctl.cli.markdown import Page

        self._page, self._region = Page(stream), Region(stream)
        self._next = 0.0

    def add(self, text: str) -> None:
        self._page.add(harmless(text))
        began = time.monotonic()
        if began < self._next:
            return
        size = shutil.get_terminal_size()
        settled, unfinished = self._page.lines(size.columns)
        self._region.draw(settled, unfinished[-max(size.lines - 1, 1) :])
        ended = time.monotonic()
        self._next = ended + max(LEAST_PAUSE, (ended - began) / MOST_SHARE)

    def end(self, exchange: Exchange | None) -> None:
        settled, unfinished = self._page.lines(shutil.get_terminal_size().columns)
        self._region.draw(settled + unfinished, [])


class Region:
    """The last lines of a terminal, which can be drawn again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._height = stream, 0

    def draw(self, settled: list[str], again: list[str]) -> None:
        """Write lines over those that were to be drawn `again`; all in one piece, so that nothing flickers.

        Each must be narrower than the terminal, and `again` not higher.
        """
        up = f"\r\x1b[{self._height - 1}A" if self._height > 1 else "\r"
        lines = "\n".join(f"\x1b[K{line}" for line in (*settled, *again))
        self._stream.write(up + lines + ("\n" if settled and not again else "") + "\x1b[J")
        self._stream.flush()
        self._height = len(again)
