"""What the user says: lines, continued lines, blocks, commands; and bytes that are no text."""

from __future__ import annotations

import io

import pytest

from llmctl.cli.turns import Pipe, Turn, next_turn
from llmctl.errors import UserError


def turns(text: str | bytes) -> list[Turn]:
    pipe = Pipe(io.BytesIO(text.encode() if isinstance(text, str) else text))
    found = []
    while (turn := next_turn(pipe)) is not None:
        found.append(turn)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n", [Turn("one"), Turn("two")]),
        ("no end", [Turn("no end")]),
        ("\n  \none\r\n\n", [Turn("one")]),
        ("", []),
        ("\ufeff你好\n", [Turn("你好")]),
        ("one\\\ntwo\\\nthree\nfour\n", [Turn("one\ntwo\nthree"), Turn("four")]),
        ("one\\\n", [Turn("one")]),
        ('"""one\n\n  two\\\n/three"""\nfour\n', [Turn("one\n\n  two\\\n/three"), Turn("four")]),
        ('"""\none\n"""\n', [Turn("one")]),
        ('  """one"""  \n', [Turn("one")]),
        ('"""\n\n"""\none\n', [Turn("one")]),
        ("/help\n", [Turn("help", command=True)]),
        ("/ system  Be brief. \n", [Turn("system  Be brief.", command=True)]),
        ("/system Be\\\nbrief.\n", [Turn("system Be\nbrief.", command=True)]),
        ("//etc/hosts?\n", [Turn("/etc/hosts?")]),
        ("/\n", [Turn("", command=True)]),
        ('say """ to me\n', [Turn('say """ to me')]),
    ],
)
def test_turns(text: str, expected: list[Turn]) -> None:
    assert turns(text) == expected


def test_bytes_that_are_no_text_are_told() -> None:
    with pytest.raises(UserError) as caught:
        turns(b"one\n\ncaf\xe9 au lait\n")
    assert caught.value.message == "stdin: line 3 is not UTF-8 text (byte 4)"
    assert caught.value.hint == "convert it to UTF-8"


def test_a_block_that_never_ends_is_told() -> None:
    with pytest.raises(UserError) as caught:
        turns('"""one\ntwo\n')
    assert caught.value.message == 'the text that began with """ never ends'
    assert caught.value.hint == 'close it with """'
