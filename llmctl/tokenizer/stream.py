"""Text out of token ids as they arrive."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.special import ESCAPE

# What a text ends with while its last character is not all there: what decoding gives for the first
# bytes of a character, and the first half of our own escape.
UNFINISHED = ("\ufffd", ESCAPE)
LATER = 3  # ids that may still come to finish a character, which has four bytes at most


class TextStream:
    """Decodes new ids after a prompt; text comes out as soon as no later id can change it.

    New ids are decoded together with the last ones whose text is out, at first the prompt's, so a word
    piece keeps the space that a tokenizer drops at the beginning of a text. So the work for one id
    does not grow with the text.

    Args:
        said: special tokens that are text all the same, as `<think>` may be.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int], said: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        special = {token for token, about in tokenizer.added_tokens_decoder.items() if about.special}
        self._unsaid = special - said if said else None
        self._before = list(prompt_ids)  # ids whose text is out
        self._length = len(self._decode(self._before))  # characters they decode to
        self._held: list[int] = []  # ids whose text is not
        self._out: list[str] = []

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._held.append(token)
        if self._text_of(self._held).endswith(UNFINISHED):
            return self._give(len(self._held) - LATER)
        return self._give(len(self._held))

    def rest(self) -> str:
        """What is still held back, at the end."""
        return self._give(len(self._held))

    @property
    def text(self) -> str:
        """All new text so far, without the prompt and without special tokens but those that are said."""
        return "".join(self._out) + self._text_of(self._held)

    def _give(self, count: int) -> str:
        """Text of the first `count` held ids, which are then before the others."""
        if count < 1:
            return ""
        given, self._held = self._held[:count], self._held[count:]
        new = self._text_of(given)
        # ids without text, such as special tokens, are no start for those after them
        self._before = given if new else self._before + given
        self._length = len(self._decode(self._before))
        self._out.append(new)
        return new

    def _text_of(self, ids: list[int]) -> str:
        return self._decode(self._before + ids)[self._length :]

    def _decode(self, ids: list[int]) -> str:
        if self._unsaid is None:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        return self._tokenizer.decode([token for token in ids if token not in self._unsaid])
