"""docs/pictures.py: its screen against what programs send, its sessions, and the pictures that lie in docs/figures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def script() -> ModuleType:
    """docs/pictures.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PICTURES = script()

# Lines that scroll nothing: what is written, and what then stands on a screen of ten columns.
WRITTEN = {
    "lines": ("one\r\ntwo\r\n", "one\ntwo\n"),
    "a return writes over": ("10 %\r20 %", "20 %"),
    "erase to the end": ("long line\rab\x1b[K", "ab"),
    "erase from the start": ("abcdef\x1b[3D\x1b[1K", "    ef"),
    "erase the line": ("abc\x1b[2Kd", "   d"),
    "a bar of two lines drawn again": ("a 1\r\nb 1\r\x1b[1Aa 2\r\nb 2\r\n", "a 2\nb 2\n"),
    "erase what is below": ("a\r\nb\r\nc\x1b[2A\x1b[J", "a"),
    "past the edge": ("0123456789ab", "0123456789\nab"),
    "wide characters": ("北京ab", "北京ab"),
    "a wide one past the edge": ("012345678北", "012345678\n北"),
    "backspace": ("ab\b \b", "a"),
    "tab": ("a\tb", "a       b"),
    "column": ("abc\x1b[2GX", "aXc"),
    "lines up to their start": ("ab\r\ncd\x1b[Fx", "xb\ncd"),
    "modes and titles draw nothing": ("\x1b[?25l\x1b[?2004h\x1b]0;title\x07a\x1b(B\x1b[0m\x1b7", "a"),
    "colours": ("\x1b[1;31mred\x1b[0m plain", "red plain"),
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("step", [1000, 1])
def test_screen(case: str, step: int) -> None:
    """In one piece and byte by byte, sequences cut anywhere."""
    text, shown = WRITTEN[case]
    screen = PICTURES.Screen(10)
    for start in range(0, len(text), step):
        screen.feed(text[start : start + step])
    assert screen.plain() == shown


def test_colours_reach_the_picture() -> None:
    screen = PICTURES.Screen(20)
    screen.feed("\x1b[31mred\x1b[0m plain\r\n\r\n")
    assert screen.ansi() == "\x1b[0m\x1b[31mred\x1b[0m plain\x1b[0m"
    picture = PICTURES.drawn(screen, "name")
    assert "#f07178" in picture and ">red<" in picture.replace("&#160;", " ")


def test_the_middle_is_left_out() -> None:
    screen = PICTURES.Screen(20)
    screen.feed("$ one\r\ntwo\r\nthree\r\nfour\r\nfive\r\n\r\n")
    lines = PICTURES.Text.from_ansi(screen.ansi(2)).plain.splitlines()
    assert lines == ["$ one", "…", "four", "five"]
    lines = PICTURES.Text.from_ansi(screen.ansi(3)).plain.splitlines()
    assert lines == ["$ one", "two", "three", "four", "five"]


def test_a_session(tmp_path: Path) -> None:
    """Keys are typed when the program waits for them; the program sees a terminal of the scene's width."""
    command = 'test -t 0 && stty size; printf "name? "; read name; echo "hello $name"'
    screen = PICTURES.play(PICTURES.Scene(command, (("name?", "Ada\r"),), columns=72), tmp_path)
    lines = screen.plain().splitlines()
    assert f"{PICTURES.ROWS} 72" in lines
    assert lines[-2:] == ["name? Ada", "hello Ada"]


def test_a_session_that_does_not_end(tmp_path: Path) -> None:
    scene = PICTURES.Scene("echo waiting; read name", (("never shown", "x"),), seconds=1.5)
    with pytest.raises(TimeoutError, match=r"the session did not end; the screen:\n(.|\n)*waiting"):
        PICTURES.play(scene, tmp_path)


@pytest.mark.parametrize("name", PICTURES.SCENES)
def test_pictures_need_nothing_but_themselves(name: str) -> None:
    picture = (DOCS / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert not re.findall(r"@font-face|@import|https?://(?!www\.w3\.org/2000/svg)", picture)
    assert set(re.findall(r"url\((.)", picture)) <= {"#"}
    assert "/tmp/" not in picture and "/home/" not in picture and "/root" not in picture
