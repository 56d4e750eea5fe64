"""Texts on one line: cut between words, never inside a special token."""

from __future__ import annotations

import pytest

from llmctl.talk import beginning, ending

TALK = "<|im_start|>user\nHow many apples has Tom?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("a b", 3, "a b"),
        ("a\n\tb\x1b", 9, "a b"),
        ("one two three", 9, "… two three"),
        ("one two three", 8, "… three"),
        ("one twothree", 7, "… wothree"),
        (TALK, 20, "… assistant"),
        (TALK, 24, "… <|im_start|>assistant"),
        (TALK, 30, "… <|im_start|>assistant"),
        (TALK, 34, "… <|im_end|> <|im_start|>assistant"),
        ("汤姆有几个苹果？", 4, "… 个苹果？"),
        ("", 5, ""),
    ],
)
def test_ending(text, most, shown):
    assert ending(text, most) == shown


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("one two", 7, "one two"),
        ("one two three", 8, "one two …"),
        ("一二三四五", 3, "一二三 …"),
        ("abcdefgh", 4, "abcd …"),
    ],
)
def test_beginning(text, most, shown):
    assert beginning(text, most) == shown


def test_no_ending_begins_inside_a_word_or_a_mark():
    for most in range(20, 70):
        shown = ending(TALK * 3, most).removeprefix("… ")
        assert len(shown) <= most
        assert (" ".join((TALK * 3).split())).endswith(shown)
        assert shown.startswith(
            ("<|", "user", "How", "many", "apples", "has", "Tom?", "assistant", "<|im_end|>")
        )
