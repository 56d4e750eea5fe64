"""Tokens and characters with a meaning of their own in every tokenizer that is trained here."""

from __future__ import annotations

PAD = "<|pad|>"
BOS = "<|bos|>"
EOS = "<|eos|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN_START, TURN_END)  # their ids are 0, 1, 2, 3, 4
UNKNOWN = "<|unk|>"  # id 5, of the kinds that have it
WITH_UNKNOWN = (*SPECIAL_TOKENS, UNKNOWN)

SPACE = "\u2581"  # how SentencePiece writes a space

# A text may contain U+2581 itself, which must not come back as a space. It is written as two control
# characters, and the first of them, where a text has it, as two as well.
ESCAPE = "\x10"  # "data link escape"
ESCAPED_SPACE, ESCAPED_ESCAPE = ESCAPE + "\x11", ESCAPE + "\x12"
