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
from dataclasses import dataclass

from tokenizers import Tokenizer

from llmctl.tokenizer.load import encode_with

KNOWN = 16  # tails that are remembered: a template has one or two


class SpanError(ValueError):
    """The tokens before a bound of a span are others once the text goes on.

    Args:
        end: it is the end of the span.
    """

    def __init__(self, end: bool) -> None:
        super().__init__("the tokens before a bound change with what follows it")
        self.end = end


@dataclass(frozen=True, slots=True)
class Spanned:
    """A text, and spans [start, end) of it in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as ids, and spans [start, end) of it in tokens."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Tail:
    """The text between the last special token before a bound, that token included, and the bound.

    Args:
        token: the text of that token; empty if there is none, and the tail is all of the text.
        ids: of the tail.
    """

    token: str
    ids: list[int]


class Coder:
    """A tokenizer's backend at work on texts in which special tokens are tokens, or text if not `special`."""

    def __init__(self, backend: Tokenizer, *, special: bool = True) -> None:
        self._backend, self._special = backend, special
        self._cuts = _cuts(backend) if special else {}
        longest_first = sorted(self._cuts, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._known: dict[str, _Tail] = {}

    def encode(self, texts: Sequence[Spanned]) -> list[Encoded | SpanError]:
        """All texts; a SpanError stands where a bound has no place among the tokens."""
        rows = self._ids([one.text for one in texts])
        keys = [[self._tail(one.text, bound) for span in one.spans for bound in span] for one in texts]
        tails = self._learned(keys)
        return [self._encoded(*row, tails) for row in zip(rows, texts, keys, strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return encode_with(self._backend, texts, special=self._special)

    def _tail(self, text: str, bound: int) -> str:
        for known in self._known:
            if text.endswith(known, 0, bound):
                return known
        start = 0
        for found in self._cut.finditer(text, 0, bound):
            start = found.start()
        return text[start:bound]

    def _learned(self, keys: list[list[str]]) -> dict[str, _Tail]:
        """All tails by their text; those that come again and again are remembered."""
        new = Counter(key for row in keys for key in row if key not in self._known)
        tails = {}
        for (key, count), ids in zip(new.items(), self._ids(list(new)), strict=True):
            at = self._cut.match(key)
            tails[key] = _Tail(at[0] if at else "", ids)
            if at and count > 1 and len(self._known) < KNOWN:
                self._known[key] = tails[key]
        return self._known | tails

    def _encoded(
        self, ids: list[int], one: Spanned, keys: list[str], tails: dict[str, _Tail]
    ) -> Encoded | SpanError:
        bounds = [bound for span in one.spans for bound in span]
        places = []
        for number, (bound, key) in enumerate(zip(bounds, keys, strict=True)):
            place = len(ids) if bound == len(one.text) else self._place(ids, one.text, bound, tails[key])
            if place is None:
                return SpanError(end=number % 2 == 1)
            places.append(place)
        return Encoded(ids, tuple(zip(places[::2], places[1::2], strict=True)))

    def _place(self, ids: list[int], text: str, bound: int, tail: _Tail) -> int | None:
        """How many ids the text before `bound` has; None if they do not begin `ids`."""
        at = 0
        if tail.token:
            token = self._cuts[tail.token]
            if ids.count(token) != text.count(tail.token):  # something else became this token, or it another
                before = self._ids([text[:bound]])[0]
                return len(before) if ids[: len(before)] == before else None
            at = -1
            for _ in range(text.count(tail.token, 0, bound)):
                at = ids.index(token, at + 1)
        end = at + len(tail.ids)
        return end if ids[at:end] == tail.ids else None


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
