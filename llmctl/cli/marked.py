"""Tokens on a screen: what is trained stands out, nothing of the data reaches the terminal raw."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO

from llmctl.cli.output import JOINERS, can_draw, cell_width

Unit = tuple[str, str]  # what stands for one character, and its style; "\n" at its end ends the line
Cost = Callable[[str], int]

MOST_RUNS = 24  # of trained or untrained tokens, before those in the middle are only counted
LEAST = 160  # columns of a run that are shown at least
WORTH = 24  # columns that are not left out, because saying so would take as much
CLOSING = "，。、；：？！）》」』】”’"  # no line begins with one of these
BREAK = 2  # columns kept for the mark of a line break


@dataclass(frozen=True)
class Marks:
    """What stands for what is not seen: the ends of trained text, a token that ends generation, white space."""

    begin: str
    end: str
    stop: str
    line: str
    tab: str
    more: str


UNICODE = Marks("⟦", "⟧", "∎", "↵", "⇥", "…")
ASCII = Marks("{+", "+}", "[end]", "\\n", "\\t", "...")


@dataclass(frozen=True)
class Screen:
    """What a stream can show.

    Args:
        width: columns; None if it is no terminal, where lines are not broken.
    """

    encoding: str
    colour: bool
    width: int | None

    @property
    def marks(self) -> Marks:
        """The marks it can encode."""
        return UNICODE if encodable("".join(vars(UNICODE).values()), self.encoding) else ASCII

    def legend(self, refused: str | None) -> str:
        """How to read what is shown, a line.

        Args:
            refused: what is red, if anything can be.
        """
        marks = self.marks
        if self.colour:
            red = f" (red: {refused})" if refused else ""
            return f"green: trained{red}; reversed: ends generation"
        return f"{marks.begin}trained{marks.end}; {marks.stop} follows what ends generation"


def screen_of(stream: TextIO) -> Screen:
    """What `stream` can show. NO_COLOR and TERM=dumb are heard; a pipe gets neither colours nor line breaks."""
    terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    return Screen(stream.encoding or "ascii", can_draw(stream), width)


def encodable(text: str, encoding: str) -> bool:
    """Whether an encoding has all characters of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Tokens:
    """Tokens to show.

    Args:
        texts: what each one completes.
        trained, special, stops: whether each one is trained, special, and ends generation.
        tone: style of what is trained.
    """

    texts: Sequence[str]
    trained: Sequence[bool]
    special: Sequence[bool]
    stops: Sequence[bool]
    tone: str


@dataclass(frozen=True)
class Gap:
    """Tokens that are left out."""

    tokens: int

    def said(self, marks: Marks) -> str:
        """How many, in brackets."""
        return f"[{marks.more} {self.tokens:,} token{'' if self.tokens == 1 else 's'} {marks.more}]"


def shortened(
    trained: Sequence[bool], costs: Sequence[int], room: int | None, least: int = LEAST
) -> list[int | Gap]:
    """Which tokens to show, as indices, with gaps between: of every run the beginning and the end.

    Short runs stay whole, the others share what they leave; None is room for all.

    Args:
        costs: columns each token takes.
    """
    runs = [[i for i, _ in group] for _, group in groupby(enumerate(trained), key=lambda pair: pair[1])]
    if room is None:
        return list(range(len(trained)))
    middle: list[int] = []
    if len(runs) > MOST_RUNS:
        half = MOST_RUNS // 2
        middle = [i for run in runs[half:-half] for i in run]
        runs = [*runs[:half], [], *runs[-half:]]
    most = _level([sum(costs[i] for i in run) for run in runs], room, least)
    shown: list[int | Gap] = []
    for run in runs:
        shown += _ends(run, costs, most) if run else [Gap(len(middle))]
    return shown


def _level(lengths: list[int], room: int, least: int) -> int:
    """The most that each may have so that all together have `room`."""
    left = room
    for place, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - place)
        if length > share:
            return max(share, least)
        left -= length
    return max(lengths, default=0)


def _ends(run: list[int], costs: Sequence[int], most: int) -> list[int | Gap]:
    """A run whose middle is left out if it costs more than `most`."""
    if sum(costs[i] for i in run) <= most + WORTH:
        return list(run)
    head = _first(run, costs, most // 2)
    rest = run[head:]
    tail = _first(rest[::-1], costs, most // 2)
    return [*run[:head], Gap(len(rest) - tail), *rest[len(rest) - tail :]]


def _first(run: list[int], costs: Sequence[int], most: int) -> int:
    """How many tokens of a run cost at most `most`."""
    for count, index in enumerate(run):
        most -= costs[index]
        if most < 0:
            return count
    return len(run)


def units(tokens: Tokens, shown: Iterable[int | Gap], screen: Screen) -> Iterator[Unit]:
    """The tokens as what stands for each of their characters. Without colour, marks stand around what is trained."""
    marks, inside = screen.marks, False
    for one in shown:
        if isinstance(one, Gap):
            yield one.said(marks), "dim"
            continue
        trained, stop = tokens.trained[one], tokens.stops[one]
        if trained != inside and not screen.colour:
            yield (marks.begin if trained else marks.end), ""
        inside = trained
        style = tokens.tone if trained else "cyan" if tokens.special[one] else ""
        if stop:
            style = f"{style} reverse"
        for character in tokens.texts[one]:
            quiet = "dim" if character in "\n\t" and not trained else style
            yield visible(character, screen), quiet
        if stop and not screen.colour:
            yield marks.stop, ""
    if inside and not screen.colour:
        yield marks.end, ""


def visible(character: str, screen: Screen) -> str:
    """What stands for a character: itself, a mark, or its code. A line break still breaks the line."""
    marks = screen.marks
    if character == "\n":
        return f"{marks.line}\n"
    if character == "\t":
        return marks.tab
    plain = character.isprintable() or unicodedata.category(character) == "Zs" or character in JOINERS
    claimed = not screen.colour and character in (marks.begin, marks.end, marks.stop)
    if plain and not claimed and encodable(character, screen.encoding):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def printable(text: str, screen: Screen) -> str:
    """A text on one line, nothing of it raw."""
    return "".join(visible(c, screen).rstrip("\n") for c in text)


def lines(found: Iterable[Unit], width: int | None) -> Iterator[list[Unit]]:
    """Units as lines of at most `width` columns, broken after a space or a wide character if there is one near."""
    line: list[Unit] = []
    used = 0
    for text, style in found:
        needed = cell_width(text.rstrip("\n"))
        # the mark of a line break always fits
        if width is not None and line and not text.endswith("\n") and used + needed > width - BREAK:
            cut = _break(line, text)
            yield line[:cut]
            line = line[cut:]
            used = sum(cell_width(unit) for unit, _ in line)
        line.append((text.rstrip("\n"), style))
        used += needed
        if text.endswith("\n"):
            yield line
            line, used = [], 0
    if line:
        yield line


def _break(line: list[Unit], following: str) -> int:
    """Where to break a line that `following` does not fit on: the units before it stay."""
    if _is_wide(following):
        return len(line) - (following in CLOSING and len(line) > 1)
    for place in range(len(line), len(line) // 2, -1):
        text = line[place - 1][0]
        if text == " " or _is_wide(text):
            return place
    return len(line)


def _is_wide(text: str) -> bool:
    return len(text) == 1 and cell_width(text) == 2


def show(found: Iterable[Unit], screen: Screen, stream: TextIO, margin: str = "") -> None:
    """Write units to a stream, in colour if it takes colour."""
    width = None if screen.width is None else max(screen.width - len(margin), 8)
    if not screen.colour:
        for line in lines(found, width):
            stream.write(margin + "".join(text for text, _ in line) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for line in lines(found, width):
        text = Text(margin)
        for style, group in groupby(line, key=lambda unit: unit[1]):
            text.append("".join(unit for unit, _ in group), style)
        console.print(text, soft_wrap=True)
