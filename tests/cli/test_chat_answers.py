"""Answers on the screen: drawn Markdown that grows, plain text, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import os
import shutil
import time

import pytest

from llmctl.cli.answers import DrawnAnswer, PlainAnswer, answer_for
from llmctl.cli.markdown import line_spans
from llmctl.cli.output import cell_width, harmless
from tests.cli.terminal import Terminal

MARKDOWN = """# A heading 标题

Some **bold** words, `code`, and *more* of them, enough to fill a line and some of the next one.
A line of its own.

中文段落：北京是中华人民共和国的首都，也是全国的政治中心、文化中心，有三千多年的建城历史，人口两千多万。

1. first
2. second with List<String> and <b>tags</b>
   - inside

```python
def double(n: int) -> int:
    return 2 * n
{code}
```

| name | value |
|---|---:|
| 北京 | 1 |

> quoted
> twice

Title
-----

{items}

[1]: http://example.com/one
![picture](http://example.com/two.png) [link](http://example.com/three)

The end, 完。""".format(
    code="\n".join(f"    line({n})" for n in range(30)),
    items="\n".join(f"- item {n} {'word ' * (n % 12)}" for n in range(30)),
)


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[int, int]:
    """Columns and rows of the terminal; every bit of an answer is drawn."""
    columns, rows = request.param
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *given: os.terminal_size((columns, rows)))
    clock = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * 1000.0)
    return columns, rows


def drawn(text: str, size: tuple[int, int], step: int) -> Terminal:
    """A terminal on which an answer came in bits of `step` characters, below a line that was there."""
    terminal = Terminal(*size)
    terminal.write("> question\n")
    answer = DrawnAnswer(terminal)
    for at in range(0, len(text), step):
        answer.add(text[at : at + step])
    answer.end(None)
    return terminal


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (30, 5)], indirect=True)
@pytest.mark.parametrize("step", [5, 13])
def test_a_text_that_grows_ends_as_if_it_had_come_at_once(size: tuple[int, int], step: int) -> None:
    """Longer than the screen: no line twice, none lost, and what scrolled away was right when it did."""
    whole = drawn(MARKDOWN, size, len(MARKDOWN))
    growing = drawn(MARKDOWN, size, step)
    assert growing.lines == whole.lines
    assert len(whole.lines) > size[1]
    assert whole.lines[0] == "> question"
    assert max(map(cell_width, whole.lines)) < size[0]


@pytest.mark.parametrize("size", [(80, 24)], indirect=True)
def test_what_is_being_written_can_be_seen(size: tuple[int, int]) -> None:
    """Each bit stands on the screen as soon as it came, also in a block higher than the screen."""
    terminal = drawn("```\n" + "\n".join(f"line {n}" for n in range(60)), size, 8)
    for n in range(59):
        assert any(f"line {n}" in show for show in terminal.shows), n
    assert terminal.lines == ["> question", *(f"  line {n}" for n in range(60))]


@pytest.mark.parametrize("size", [(80, 24)], indirect=True)
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("**bold** and `code`", ["bold and code"]),
        ("one\ntwo", ["one", "two"]),
        ("北京\n上海", ["北京", "上海"]),
        ("vector<int> a; <br> &lt;", ["vector<int> a; <br> <"]),
        ("<div>\nkept\n</div>", ["<div>", "kept", "</div>"]),
        ("[1]: http://a.b/c", ["[1]: http://a.b/c"]),
        ("[a](http://b.c)", ["a (http://b.c)"]),
        ("<http://b.c>", ["<http://b.c>"]),
        ("# One\n\n### Two", ["One", "", "Two"]),
        ("a\n\n\n\nb", ["a", "", "b"]),
        ("", [""]),
        ("\n\n", [""]),
        ("an unfinished **word", ["an unfinished **word"]),
        ("```\nunfinished", ["  unfinished"]),
    ],
)
def test_markdown(text: str, lines: list[str], size: tuple[int, int]) -> None:
    expected = "\n".join(["> question", *lines]).rstrip("\n").split("\n")
    assert drawn(text, size, 3).lines == expected


@pytest.mark.parametrize("size", [(80, 24)], indirect=True)
def test_nothing_in_an_answer_moves_the_cursor(size: tuple[int, int]) -> None:
    text = "a\x1b[2Jb\x07c\r\nd\x9be\u202ef\u200dg"
    expected = ["a\\x1b[2Jb\\x07c", "d\\x9be\\u202ef\u200dg"]
    assert [harmless(line) for line in text.split("\n")] == expected
    assert drawn(text, size, 2).lines[1:] == expected
    plain = Terminal(*size)
    answer = PlainAnswer(plain)
    answer.add(text)
    answer.end(None)
    assert plain.lines == expected


def test_a_pipe_gets_the_text_as_it_is() -> None:
    stream = io.StringIO()
    answer = answer_for(stream, as_json=False)
    for text in ("\x1b[1m**a**", " 你"):
        answer.add(text)
    assert stream.getvalue() == "\x1b[1m**a** 你"
    answer.end(None)
    assert stream.getvalue() == "\x1b[1m**a** 你\n"


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
def test_a_terminal_that_cannot_draw_gets_plain_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(answer_for(Terminal(80, 24), as_json=False), DrawnAnswer)
    monkeypatch.setenv(name, {"NO_COLOR": "1", "TERM": "dumb"}[name])
    assert isinstance(answer_for(Terminal(80, 24), as_json=False), PlainAnswer)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two", "three"]),
        ("on  two", ["on  two"]),
        ("中文文字，一二", ["中文文", "字，一", "二"]),
        ("中文文字字，二", ["中文文字", "字，二"]),
        ("ab（中文）中", ["ab（中", "文）中"]),
        ("in 中文，是", ["in 中文，", "是"]),
        ("averyverylong word", ["averyver", "ylong", "word"]),
        ("a\n\nb", ["a", "", "b"]),
        ("", [""]),
    ],
)
def test_lines_break_where_the_language_allows(text: str, lines: list[str]) -> None:
    """At most nine columns, or what is named."""
    width = {"中文文字，一二": 7, "averyverylong word": 8, "ab（中文）中": 8}.get(text, 9)
    assert [text[start:end].rstrip() for start, end in line_spans(text, width)] == lines
