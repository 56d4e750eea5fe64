"""How work in progress looks on stderr: a live line on a terminal, a plain line now and then elsewhere.

Both show the same words, which `Pace` makes: count, rate, time left, and the facts a stage reports.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from llmctl.cli.output import can_draw, duration, echo, harmless, one_line
from llmctl.talk import Bar, Talk

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

WINDOW = 60  # samples the rate is taken over, half a second apart
SAMPLE = 0.5  # seconds
SHORT = 2.0  # seconds; work shorter than this leaves no line behind
LONGEST_BAR = 40  # columns
SHORTEST_BAR = 8


def make_talk() -> Talk:
    """A live display if stderr is a terminal that can draw, else plain lines."""
    return LiveTalk() if can_draw(sys.stderr) else PlainTalk(sys.stderr)


class Pace:
    """Work done so far on one bar, and how fast it goes."""

    def __init__(
        self, label: str, total: float | None, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.facts: dict[str, str] = {}
        self.rate: float | None = None  # units per second over the last half minute
        self._clock = clock
        self._begin = clock()
        # The first advance is where counting starts: work that compiles first stalls there.
        self._samples: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._first: tuple[float, float] | None = None

    def resume(self, done: float, seconds: float) -> None:
        """Begin with what an earlier process did; counting the rate starts here."""
        self.done, self._begin = done, self._begin - seconds
        self._first = (self._clock(), done)
        self._samples.append(self._first)

    def advance(self, amount: float = 1, **facts: str) -> None:
        """Count `amount` more units."""
        self.done += amount
        if facts:
            self.facts = {**self.facts, **facts}
        now = self._clock()
        if self._first is None:
            self._first = (now, self.done)
            self._samples.append(self._first)
            if (
                self.total is not None and now - self._begin >= SAMPLE
            ):  # large pieces: an estimate until the second one is done
                self.rate = self.done / (now - self._begin)
            return
        if now - self._samples[-1][0] >= SAMPLE or self.rate is None:
            then, before = self._samples[0]
            if now > then:
                self.rate = (self.done - before) / (now - then)
            if now - self._samples[-1][0] >= SAMPLE:
                self._samples.append((now, self.done))

    @property
    def elapsed(self) -> float:
        """Seconds since the bar began."""
        return self._clock() - self._begin

    def parts(self) -> list[str]:
        """Count, rate, time left, then one entry a fact."""
        if not self.unit:
            return [duration(self.elapsed), *_facts(self.facts)]
        count = _count(self.done)
        if self.total is not None:
            count += f"/{_count(self.total)}"
        parts = [f"{count} {self.unit}"]
        if self.rate is not None:
            parts.append(f"{_rate(self.rate)} {self.unit}/s")
        if self.total is not None and self.rate and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        elif self.total is None:
            parts.append(duration(self.elapsed))
        return parts + _facts(self.facts)

    def summary(self) -> str:
        """The line that stays when the work is done."""
        if not self.unit:
            return f"{self.label}: " + " · ".join(self.parts())
        parts = [f"{_count(self.done)} {self.unit} in {duration(self.elapsed)}"]
        if self._first is not None and self.elapsed > 0:
            then, before = self._first
            span = self._clock() - then
            if self.done > before and span > 0:
                parts.append(f"{_rate((self.done - before) / span)} {self.unit}/s")
        return f"{self.label}: " + " · ".join(parts + _facts(self.facts))

    def fitted(self, width: int) -> tuple[str, int, str]:
        """Label, columns for the bar (0: none) and the rest, within `width` columns.

        Facts are dropped from the last before the bar is, and the end is cut if even that is too long.
        """
        parts, least = self.parts(), len(self.parts()) - len(self.facts)
        room = len(self.label) + 1 + (SHORTEST_BAR + 1 if self.total else 0)
        while len(parts) > least and room + len("  ".join(parts)) > width:
            parts.pop()
        text = "  ".join(parts)
        bar = min(LONGEST_BAR, width - len(self.label) - len(text) - 2) if self.total else 0
        return self.label, bar if bar >= SHORTEST_BAR else 0, text[: max(0, width - len(self.label) - 1)]

    @property
    def share(self) -> float:
        """Done, from 0 to 1; 0 when the total is unknown."""
        return min(1.0, self.done / self.total) if self.total else 0.0


def _facts(facts: dict[str, str]) -> list[str]:
    return [f"{name} {value}" for name, value in facts.items()]


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


class _PlainBar:
    """A bar that writes a line every few seconds, more rarely the longer the work lasts."""

    def __init__(self, pace: Pace, say: Callable[[str], None]) -> None:
        self.pace, self._say = pace, say
        self._next = 5.0  # seconds since the beginning

    def resume(self, done: float, seconds: float) -> None:
        self.pace.resume(done, seconds)
        self._next += seconds

    def advance(self, amount: float = 1, **facts: str) -> None:
        self.pace.advance(amount, **facts)
        elapsed = self.pace.elapsed
        if elapsed >= self._next:
            self._next = elapsed + min(60.0, max(5.0, elapsed / 10))
            self._say(f"{self.pace.label}: " + " · ".join(self.pace.parts()))


class PlainTalk:
    """Lines of text without control characters, for logs and pipes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._open = 0

    def say(self, text: str) -> None:
        """One line."""
        # A log reader that went away must not end hours of training, so nobody is told.
        with contextlib.suppress(BrokenPipeError):
            echo(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        """A count that speaks now and then, and once at the end if it took a while."""
        pace = Pace(label, total, unit, self._clock)
        self._open += 1
        try:
            yield _PlainBar(pace, self.say)
        finally:
            self._open -= 1
        if not self._open and pace.elapsed >= SHORT:
            self.say(pace.summary())


class LiveTalk:
    """One redrawn line a bar, below everything else that is written to stderr meanwhile."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._paces: list[Pace] = []
        self._live: Live | None = None
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """One line, above the bars."""
        self._console.print(harmless(text), markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        """A live line; when the outermost bar ends, a line that sums it up stays if it took a while."""
        pace = Pace(label, total, unit)
        with self._lock:
            self._paces.append(pace)
        if self._live is None:
            self._start()
        try:
            yield pace
        finally:
            with self._lock:
                self._paces.remove(pace)
            if not self._paces:
                self._stop()
        if not self._paces and pace.elapsed >= SHORT:
            self.say(pace.summary())

    def _start(self) -> None:
        from rich.live import Live

        # stdout is data and may be a pipe or a file, so it is left alone
        self._live = Live(
            get_renderable=self._drawing,
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _drawing(self) -> Text:
        from rich.text import Text

        fancy = self._console.encoding.lower().startswith("utf")
        done, rest = ("━", "─") if fancy else ("#", "-")
        drawing = Text(no_wrap=True, overflow="crop")
        with self._lock:
            paces = list(self._paces)
        for row, pace in enumerate(paces):
            label, columns, text = pace.fitted(self._console.width - 1)
            label, text = one_line(label), one_line(text)
            filled = round(columns * pace.share)
            drawing.append("\n" if row else "").append(f"{label} ", "bold")
            if columns:
                drawing.append(done * filled, "cyan").append(rest * (columns - filled) + " ", "dim")
            drawing.append(text)
        return drawing
