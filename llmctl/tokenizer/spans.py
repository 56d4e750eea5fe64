"""Texts as ids, and where spans of a text lie in its ids.

A bound of a span lies where the ids of the text before it end, so what stands before an answer in training is
exactly what a model is given at inference. No token is asked for its place in the text, which would cost a
quarter of the tokenizer's speed: a special token cuts a text in two parts that know nothing of each other, so
only what follows the last one has to be encoded by itself, and mostly that is the same few words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from operator import eq
from typing import NamedTuple

from tokenizers import Tokenizer

from llmctl.tokenizer.load import encode_with, starts_with

Span = tuple[int, int]
LONG = 1 << 16  # ids
KNOWN = 16  # tails that are remembered: a template has one or two


class SpanError(ValueError):
    """The tokens before a bound of a span are others once the text goes on.

    Args:
        end: it is the end of the span.
    """

    def __init__(self, end: bool) -> None:
        super().__init__("the tokens before a bound change with what follows it")
        self.end = end


class Rendered(NamedTuple):
    """A text, and spans [start, end) of it in characters.

    Args:
        guarded: placeholders stand for control tokens (guard.py).
        turns: for each span the index of the message that it belongs to.
        left: (reason, index) of answers that are not trained, or not as they should be (answers.py).
    """

    text: str
    spans: tuple[Span, ...]
    guarded: bool = False
    turns: tuple[int, ...] = ()
    left: tuple[tuple[str, int], ...] = ()


class Encoded(NamedTuple):
    """A text as ids, and spans [start, end) of it in tokens.

    Args:
        joined: spans that lost tokens at an edge, because a token there belongs to what stands beside it too.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    joined: int = 0


class _Tail(NamedTuple):
    """The text between the last special token before a bound, that token included, and the bound.

    Args:
        token: the text of that token; empty if there is none, and the tail is all of the text.
        number: its id.
        ids: of the tail.
    """

    token: str
    number: int
    ids: list[int]


class Coder:
    """A tokenizer's backend at work on texts in which special tokens are tokens, or text if not `special`."""

    def __init__(self, backend: Tokenizer, *, special: bool = True) -> None:
        self._backend, self._special = backend, special
        self._cuts = _cuts(backend) if special else {}
        longest_first = sorted(self._cuts, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._known: dict[str, _Tail] = {}

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded | SpanError]:
        """All texts; a SpanError stands where a bound has no place among the tokens."""
        return self.located(texts, self.ids(texts))

    def ids(self, texts: Sequence[Rendered]) -> list[list[int]]:
        """The ids alone: the part that leaves Python to other threads."""
        return self._ids([one.text for one in texts])

    def located(self, texts: Sequence[Rendered], rows: list[list[int]]) -> list[Encoded | SpanError]:
        """The rest of `encode`."""
        none: dict[str, _Tail] = {}
        found = [self._encoded(*row, none) for row in zip(rows, texts, strict=True)]
        if new := [number for number, one in enumerate(found) if one is None]:
            tails = self._learned([texts[number] for number in new])
            for number in new:
                found[number] = self._encoded(rows[number], texts[number], tails)
        return [one for one in found if one is not None]

    def within(self, one: Rendered, ids: list[int]) -> Encoded:
        """The spans of a text cut down to the tokens that lie wholly inside them: where `encode` gives a SpanError."""
        spans, joined = [], 0
        for begin, end in one.spans:
            before, after, through = self._ids([one.text[:begin], one.text[begin:], one.text[:end]])
            first = len(before)
            if ids[:first] != before:
                # The tokens that a text ends with are those of its end alone, as far back as both agree: but some
                # tokenizers put a space before a text, and some leave it out of the place of a token.
                first = len(ids) - _common(ids[::-1], after[::-1])
                starts = starts_with(self._backend, one.text, special=self._special)
                first = max(first, next((at for at, start in enumerate(starts) if start >= begin), len(ids)))
            last = _common(ids, through)
            joined += ids[:first] != before or last != len(through)
            spans.append((first, max(first, last)))
        return Encoded(ids, tuple(spans), joined)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return encode_with(self._backend, texts, special=self._special)

    def _learned(self, texts: list[Rendered]) -> dict[str, _Tail]:
        """All tails by their text; those that come again and again are remembered."""
        keys = Counter(self._key(one.text, bound) for one in texts for bound in chain(*one.spans))
        tails = {}
        for (key, count), ids in zip(keys.items(), self._ids(list(keys)), strict=True):
            at = self._cut.match(key)
            tails[key] = _Tail(at[0], self._cuts[at[0]], ids) if at else _Tail("", 0, ids)
            if at and count > 1 and len(self._known) < KNOWN:
                self._known[key] = tails[key]
        return tails

    def _key(self, text: str, bound: int) -> str:
        start = 0
        for found in self._cut.finditer(text, 0, bound):
            start = found.start()
        return "" if bound == len(text) else text[start:bound]

    def _encoded(self, ids: list[int], one: Rendered, tails: dict[str, _Tail]) -> Encoded | SpanError | None:
        """None if a tail is neither known nor among `tails`."""
        text, spans = one.text, one.spans
        known, length, places = self._known, len(text), []
        at: dict[int, list[int]] = {}  # special token -> its places in ids
        for bound in chain(*spans):
            if bound == length:
                places.append(len(ids))
                continue
            for key in known:
                if text.endswith(key, 0, bound):
                    token, number, wanted = known[key]
                    break
            else:
                if not tails:
                    return None
                token, number, wanted = tails[self._key(text, bound)]
            begin = 0
            if token:
                if number not in at:
                    at[number] = _places(ids, number)
                if len(at[number]) == text.count(token):
                    begin = at[number][-1 - text.count(token, bound)]
                else:  # something else became this token, or it another one
                    wanted = self._ids([text[:bound]])[0]
            end = begin + len(wanted)
            if not _stands_at(ids, begin, wanted):
                return SpanError(end=len(places) % 2 == 1)
            places.append(end)
        pairs = iter(places)
        return Encoded(ids, tuple(zip(pairs, pairs, strict=True)))


def _stands_at(ids: list[int], begin: int, wanted: list[int]) -> bool:
    """Whether `wanted` stands in `ids` from `begin` on; of a long row no copy is made."""
    if len(wanted) <= LONG:
        return ids[begin : begin + len(wanted)] == wanted
    return begin + len(wanted) <= len(ids) and all(map(eq, islice(ids, begin, None), wanted))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with together."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _places(ids: list[int], number: int) -> list[int]:
    """Where an id stands; faster than looking at all ids one by one."""
    found, at = [], -1
    try:
        while True:
            at = ids.index(number, at + 1)
            found.append(at)
    except ValueError:
        return found


def _cuts(backend: Tokenizer) -> dict[str, int]:
    """Text -> id of the tokens that cut a text wherever they stand in it."""
    added = backend.get_added_tokens_decoder()
    texts = [token.content for token in added.values()]
    return {
        token.content: number
        for number, token in added.items()
        if token.special
        and not token.single_word
        and not token.normalized
        and sum(token.content in text for text in texts) == 1
    }
