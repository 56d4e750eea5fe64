"""Long texts as ids, a part at a time: memory grows with the part, not with the text.

A part ends where the tokenizer itself says that nothing changes: the ids of the `AROUND` characters before the place
and of those after it, joined, are the ids of both together. Where it puts a space before every text (Llama 2, T5),
a part that goes on after a space leaves that space to it.

Byte-level BPE, WordPiece and the kinds of `llmctl tokenizer train` cut a text into words before anything else, and the
place is an end of a word: that gives the ids of the whole. Others (SentencePiece without such words, Unigram) could
in principle let a choice far away change one here; no case of that is known. A stretch of `LONGEST_PART` characters
without any such place is cut where it ends, which may change the token there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmctl.cuts import PART, parts

Encode = Callable[[list[str]], list[list[int]]]

AT_ONCE = 1 << 19  # bytes of text handed to the tokenizer in one call; it takes threads for the parts


class Joints:
    """Where a tokenizer lets a text be cut.

    Args:
        encode: texts -> ids of each, without special tokens.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        whole, left, plain, spaced = encode(["a b", "a", "b", " b"])
        self.adds_space = whole == left + plain != left + spaced

    def may_cut(self, before: str, after: str) -> bool:
        """Whether the ids of both together are those of each."""
        whole, left, right = self._encode([before + after, before, self.continued(after)])
        return whole == left + right

    def continued(self, part: str) -> str:
        """What to encode of a part that is not the first of its text."""
        return part[1:] if self.adds_space and part.startswith(" ") else part


def needs_parts(texts: list[str]) -> bool:
    """Whether these are more than a tokenizer should be given in one call."""
    return sum(map(len, texts)) > AT_ONCE


def encode_in_parts(encode: Encode, texts: list[str]) -> list[list[int]]:
    """The ids of each text. An id is one object however often it comes, so a list takes 8 bytes for each, not 40."""
    found: list[list[int]] = [[] for _ in texts]
    known: dict[int, int] = {}
    for batch in _batches(encode, texts):
        for (number, _, _), ids in zip(batch, encode([text for _, _, text in batch]), strict=True):
            found[number].extend(map(known.setdefault, ids, ids))
    return found


def starts_in_parts(starts: Callable[[str], list[int]], encode: Encode, text: str) -> list[int]:
    """For each id the character at which it begins, of which `starts` tells for a part."""
    found: list[int] = []
    for batch in _batches(encode, [text]):
        for _, begin, part in batch:
            found += [begin + start for start in starts(part)]
    return found


def _batches(encode: Encode, texts: list[str]) -> Iterator[list[tuple[int, int, str]]]:
    """(number of the text, place in it, what to encode), of at most `AT_ONCE` bytes, or a part."""
    joints = Joints(encode) if any(len(text) > PART for text in texts) else None
    batch: list[tuple[int, int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        begin = 0
        for part in (text,) if joints is None else parts(text, joints.may_cut):
            shown = joints.continued(part) if joints is not None and begin else part
            weight = len(shown) if shown.isascii() else len(shown.encode("utf-8", "surrogatepass"))
            if batch and size + weight > AT_ONCE:
                yield batch
                batch, size = [], 0
            batch.append((number, begin + len(part) - len(shown), shown))
            size += weight
            begin += len(part)
    if batch:
        yield batch
