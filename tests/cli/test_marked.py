"""Tokens on a screen: marks, colours, what is escaped, where lines break, what is left out."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest

from llmctl.cli.marked import Gap, Screen, Tokens, lines, screen_of, shortened, show, units
from llmctl.cli.output import cell_width

PLAIN = Screen("utf-8", colour=False, width=None)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def tokens(*texts: str, trained: Sequence[int] = (), stops: Sequence[int] = ()) -> Tokens:
    """Tokens by their texts, and which of them are trained or end generation."""
    numbers = range(len(texts))
    special = [text.startswith("<|") for text in texts]
    return Tokens(
        texts, [n in trained for n in numbers], special, [n in stops for n in numbers], "bold green"
    )


def drawn(found: Tokens, screen: Screen = PLAIN, shown: Sequence[int | Gap] | None = None) -> str:
    stream = io.StringIO()
    show(units(found, range(len(found.texts)) if shown is None else shown, screen), screen, stream)
    return stream.getvalue()


def test_marks_without_colour() -> None:
    talk = tokens("<|user|>", "Hi", "\n", "Hello", "<|end|>", "\n", "more", trained=(3, 4, 6), stops=(4,))
    assert drawn(talk) == "<|user|>Hi↵\n⟦Hello<|end|>∎⟧↵\n⟦more⟧\n"
    assert drawn(talk, Screen("ascii", False, None)) == "<|user|>Hi\\n\n{+Hello<|end|>[end]+}\\n\n{+more+}\n"


ESCAPED = {
    "\x1b[31mred": "\\x1b[31mred",
    "bell\x07": "bell\\x07",
    "a\r\n": "a\\r↵\n",
    "tab\tbed": "tab⇥bed\n",
    "\x9b2J": "\\x9b2J",
    "over\u202eride": "over\\u202eride",
    "\u2028": "\\u2028",
    "\ue0f7": "\\ue0f7",
    "⟦not a mark⟧∎": "\\u27e6not a mark\\u27e7\\u220e",
    "\xa0\u3000é中": "\xa0\u3000é中",
    "\ufffd": "\ufffd",
}


@pytest.mark.parametrize("text", ESCAPED, ids=ascii)
def test_nothing_reaches_the_terminal_raw(text: str) -> None:
    assert drawn(tokens(text)).strip("\n") == ESCAPED[text].strip("\n")
    colour = Screen("utf-8", True, 80)
    seen = "".join(text for text, _ in units(tokens(text), [0], colour))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", seen)


def test_what_an_encoding_lacks_is_escaped() -> None:
    assert drawn(tokens("é中", trained=(0,)), Screen("latin-1", False, None)) == "{+é\\u4e2d+}\n"
    assert drawn(tokens("é"), Screen("ascii", False, None)) == "\\xe9\n"


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    stream = Terminal()
    screen = screen_of(stream)
    assert screen == Screen("utf-8", True, 80)
    talk = tokens("<|user|>", "Hi", "Hello", "<|end|>", trained=(2, 3), stops=(3,))
    show(units(talk, range(4), screen), screen, stream)
    assert stream.getvalue() == (
        "\x1b[36m<|user|>\x1b[0mHi\x1b[1;32mHello\x1b[0m\x1b[1;7;32m<|end|>\x1b[0m\n"
    )


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colour_still_breaks_lines(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv(name, value)
    stream = Terminal()
    screen = screen_of(stream)
    assert screen == Screen("utf-8", False, 30)
    show(units(tokens("one two three four five six seven", trained=(0,)), [0], screen), screen, stream, "  ")
    assert stream.getvalue() == "  ⟦one two three four five \n  six seven⟧\n"


def test_a_pipe_gets_neither_colours_nor_broken_lines() -> None:
    assert screen_of(io.StringIO()) == Screen("ascii", False, None)
    long = "word " * 100
    assert drawn(tokens(long)) == long + "\n"


def width_of(line: list[tuple[str, str]]) -> int:
    return sum(cell_width(text) for text, _ in line)


@pytest.mark.parametrize("width", [20, 33, 80])
@pytest.mark.parametrize(
    "text",
    [
        "中文没有空格，所以可以在任何地方断行。" * 9,
        "a long line of words " * 20,
        "x" * 200,
        "中x" * 90,
        "é\u0301" * 90,
    ],
)
def test_no_line_is_wider_than_the_screen_and_nothing_is_lost(text: str, width: int) -> None:
    found = list(lines(units(tokens(text), [0], PLAIN), width))
    assert max(map(width_of, found)) <= width
    assert "".join(unit for line in found for unit, _ in line) == text
    if " " not in text:  # nothing is wasted: only the room for a mark, and for a character before a comma
        assert min(map(width_of, found[:-1])) >= width - 5
    assert not any(line[0][0] in "，。" for line in found)


def test_a_line_break_mark_never_stands_alone() -> None:
    for length in range(1, 60):
        text = "x" * length + "\n"
        found = list(lines(units(tokens(text), [0], PLAIN), 20))
        assert all(len(line) > 1 for line in found)


def test_short_rows_are_shown_whole() -> None:
    assert shortened([False, True, True], [9, 9, 9], 27) == [0, 1, 2]
    assert shortened([True] * 5000, [1] * 5000, None) == list(range(5000))


def test_a_long_run_loses_its_middle_and_short_ones_nothing() -> None:
    trained = [False] * 30 + [True] * 1000 + [False] * 5
    shown = shortened(trained, [1] * len(trained), 435)
    gaps = [one for one in shown if isinstance(one, Gap)]
    assert gaps == [Gap(600)]
    at = shown.index(gaps[0])
    assert shown[:at] == list(range(30 + 200))
    assert shown[at + 1 :] == list(range(1030 - 200, 1035))


def test_what_is_shown_and_what_is_counted_is_everything() -> None:
    for runs in (1, 2, 7, 60):
        trained = [run % 2 == 1 for run in range(runs) for _ in range(3 + 40 * (run % 5))]
        costs = [1 + place % 7 for place in range(len(trained))]
        shown = shortened(trained, costs, 600)
        left_out = sum(one.tokens for one in shown if isinstance(one, Gap))
        kept = [one for one in shown if not isinstance(one, Gap)]
        assert left_out + len(kept) == len(trained)
        assert kept == sorted(set(kept))
        assert {0, len(trained) - 1} <= set(kept), "the beginning and the end are always there"


def test_a_gap_says_how_much_it_leaves_out() -> None:
    found = tokens(*"abcd", trained=(0, 1, 2, 3))
    assert drawn(found, shown=[0, Gap(2), 3]) == "⟦a[… 2 tokens …]d⟧\n"
    assert drawn(found, Screen("ascii", False, None), [0, Gap(1234), 3]) == "{+a[... 1,234 tokens ...]d+}\n"
    assert drawn(found, shown=[0, 1, Gap(1), 3]) == "⟦ab[… 1 token …]d⟧\n"
