"""Text out of token ids as they arrive."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\ufffd"  # what decoding gives for a character whose bytes are not all there yet
LONGEST_CHARACTER = 4  # bytes of a UTF-8 character, so ids to wait for it at most


class TextStream:
    """Decodes new ids after a prompt; text comes out as soon as no later id can change it.

    Decoding happens together with the last ids of the prompt, so a word piece keeps the space that
    a tokenizer drops at the beginning of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt_ids)
        self._ids: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self.text
        waiting = text.endswith(UNFINISHED) and len(self._ids) % LONGEST_CHARACTER != 0
        return "" if waiting else self._take(text)

    def rest(self) -> str:
        """What is still held back, at the end."""
        return self._take(self.text)

    @property
    def text(self) -> str:
        """All new text so far, without the prompt and without special tokens."""
        before = self._decode(self._before)
        return self._decode(self._before + self._ids)[len(before) :]

    def _take(self, text: str) -> str:
        new = text[self._given :]
        self._given = len(text)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
