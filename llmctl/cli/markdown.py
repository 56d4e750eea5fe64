"""Markdown as lines for a terminal, block by block as it is written. Imports rich, so import this late.

Nothing of a text is lost on the way, as HTML, images and link definitions would be: they are left as they are
written. A line break in a text breaks the line, as chat models mean it, and as Chinese needs, which has no space
to put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, Paragraph
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from llmctl.cli.output import cell_width

WIDEST = 100  # columns; longer lines are hard to read
OPENING = "（《「『【“‘([{"  # no line ends with one of these
CLOSING = "，。、；：？！）》」』】”’,.;:?!)]}%"  # and none begins with one of these
STYLE = re.compile(r"\x1b\[[0-9;]*m")
# the terminal's own colours, without backgrounds: nobody knows whether it is dark or light
CODE_THEME = "ansi_dark"
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.block_quote": "italic",
        "markdown.item.number": "cyan",
        "markdown.item.bullet": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.h4": "bold",
        "markdown.h5": "bold",
        "markdown.h6": "bold",
    }
)
PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["reference", "image", "autolink"])
)


class Page:
    """A text that grows, as lines.

    Attributes:
        stream: the terminal it is for.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._console = Console(file=stream, highlight=False, theme=THEME)
        self._open = ""  # the text of the blocks that are not settled
        self._begun = False

    def add(self, text: str) -> None:
        """More text. Raises nothing, whatever it holds."""
        self._open += text

    def lines(self, columns: int) -> tuple[list[str], list[str]]:
        """Lines that are settled since the last call, and the lines of the block that may still change.

        Args:
            columns: of the terminal. No line takes all of them.
        """
        source = self._open.split("\n")
        starts = [token.map[0] for token in PARSER.parse(self._open) if token.level == 0 and token.map]
        # a block is settled when another one begins below it
        settled: list[str] = []
        width = min(columns - 1, WIDEST)
        for begin, end in pairwise(starts):
            settled += self._block("\n".join(source[begin:end]), width)
            self._begun = self._begun or bool(settled)
        self._open = "\n".join(source[starts[-1] :]) if starts else self._open
        return settled, self._block(self._open, width)

    def _block(self, source: str, width: int) -> list[str]:
        """The lines of a block, after an empty one if there is something above it."""
        with self._console.capture() as captured:
            self._console.print(_Blocks(PARSER.parse(source)), width=max(width, 1), end="")
        lines = captured.get().split("\n")
        seen = [place for place, line in enumerate(lines) if STYLE.sub("", line).strip()]
        if not seen:
            return []
        return [""] * self._begun + lines[seen[0] : seen[-1] + 1]


def line_spans(text: str, width: int) -> list[tuple[int, int]]:
    """[start, end) of the lines of a text, broken at spaces and between wide characters.

    rich breaks at spaces only, which leaves holes in Chinese text and lets lines begin with a comma.
    """
    spans, start = [], 0
    for part in text.split("\n"):
        last = start + len(part)
        while start < last or not part:
            end, used = start, 0
            while end < last and (used := used + cell_width(text[end])) <= width:
                end += 1
            if end < last:
                end = max(end, start + 1)
                places = range(end, start, -1)
                end = next((at for at in places if _may_break(text[at - 1], text[at])), end)
            spans.append((start, end))
            start = end
            while start < last and text[start] == " ":
                start += 1
            if start == last:
                break
        start = last + 1
    return spans


def _may_break(before: str, after: str) -> bool:
    if after == " ":
        return True
    if after in CLOSING or before in OPENING:
        return False
    return before == " " or cell_width(before) == 2 or cell_width(after) == 2


def _flowed(text: Text, width: int) -> Iterator[Text]:
    """A text as lines that fit."""
    for start, end in line_spans(text.plain, width):
        line = text[start:end]
        line.rstrip()
        line.no_wrap, line.overflow = True, "ignore"
        yield line


class _Heading(Heading):
    """On the left, whatever its level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _flowed(self.text, options.max_width)


class _Paragraph(Paragraph):
    """Broken where Chinese may be broken too."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _flowed(self.text, options.max_width)


class _CodeBlock(CodeBlock):
    """Set in by two columns, without a frame, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))


class _Blocks(Markdown):
    """rich's Markdown, of what our parser found."""

    elements = Markdown.elements | {
        "heading_open": _Heading,
        "paragraph_open": _Paragraph,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        for token in tokens:
            for child in token.children or []:
                if child.type == "softbreak":
                    child.type = "hardbreak"
        self.parsed = tokens
