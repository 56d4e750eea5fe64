"""Where a long text may be cut so that the ids of its parts, joined, are those of the whole.

A tokenizer needs some 150 bytes of memory for each character of a text, so a text is handed to it in parts.

A place is safe if the tokenizer ends a piece there whatever stands around it. `SAFE_CUTS` are such places for the
pre-tokenizers of GPT-2, Llama 3, Qwen 2 and GPT-4o, and for those of `llmctl tokenizer train`. Whoever has the
tokenizer at hand also asks it about each place (`tokenizer/parts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice

PART = 1 << 17  # characters of a part, about
LONGEST_PART = 1 << 20  # characters after which a text is cut even where that may change a token
AROUND = 128  # characters before and after a place by which it is judged
TRIES = 32  # places of a kind that are asked about before the next kind

# A cut after a run of several newlines would not do: GPT-2 keeps the last one apart if a letter follows.
SAFE_CUTS = (
    re.compile(r"(?<=\S\n)(?=[^\W_])"),  # after a single newline, before a letter or digit
    re.compile(r"(?<=\S)(?= [^\W_])"),  # before a single space that begins a word
    re.compile(r"(?<=[^\W_])(?=[。！？；，、][^\W_])"),  # scripts without spaces: before punctuation
)

MayCut = Callable[[str, str], bool]  # (text just before a place, text just after it) -> whether it will do


def anywhere_safe(before: str, after: str) -> bool:
    """Every place of `SAFE_CUTS` will do: where no tokenizer is at hand."""
    return True


def next_cut(text: str, begin: int, may_cut: MayCut) -> tuple[int, bool] | None:
    """(end, whether no token changes by it) of the part that begins at `begin`.

    None if the rest of the text is one part, or, if more of the text is to come, is to be made longer first.
    """
    if len(text) - begin <= PART:
        return None
    near, full = begin + PART - PART // 8, begin + PART
    last = min(len(text), begin + LONGEST_PART)
    for found in (_last(text, near, full, may_cut), _last(text, begin + 1, near, may_cut)):
        if found is not None:
            return found, True
    for pattern in SAFE_CUTS:
        for match in islice(pattern.finditer(text, full, last), TRIES):
            if _asked(text, match.start(), may_cut):
                return match.start(), True
    return (last, False) if len(text) > last else None


def parts(text: str, may_cut: MayCut) -> Iterator[str]:
    """The text in parts; mostly it is one."""
    begin = 0
    while (cut := next_cut(text, begin, may_cut)) is not None:
        yield text[begin : cut[0]]
        begin = cut[0]
    yield text[begin:] if begin else text


def _last(text: str, low: int, high: int, may_cut: MayCut) -> int | None:
    """The last safe place in a stretch of text; the kinds of places in their order."""
    for pattern in SAFE_CUTS:
        places = [match.start() for match in pattern.finditer(text, low, high)]
        for place in islice(reversed(places), TRIES):
            if _asked(text, place, may_cut):
                return place
    return None


def _asked(text: str, place: int, may_cut: MayCut) -> bool:
    return may_cut(text[max(0, place - AROUND) : place], text[place : place + AROUND])
