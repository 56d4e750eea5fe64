"""Cutting and packing: every token is trained once, no row is too long, rows are full."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.data.packing import Pieces, cut, pack, text_bytes, unpacked
from llmctl.errors import UserError

document_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def labels(pieces: Pieces) -> list[int]:
    """Offsets of all trained tokens."""
    return [t for s, n in zip(pieces.start, pieces.length, strict=True) for t in range(s + 1, s + n)]


@settings(deadline=None)
@given(lengths=document_lengths, max_length=st.integers(2, 12))
def test_split_trains_every_token_but_the_first_once(lengths, max_length):
    lengths = [*lengths, 5]
    doc_start = starts(lengths)
    pieces = cut(doc_start, max_length, "split")
    wanted = [t for a, b in pairwise(doc_start) for t in range(a + 1, b)]
    assert labels(pieces) == wanted
    assert pieces.trained_tokens == len(wanted)
    assert 2 <= pieces.length.min() <= pieces.length.max() <= max_length
    for a, b, doc in zip(pieces.start, pieces.length, pieces.doc, strict=True):
        assert doc_start[doc] <= a < a + b <= doc_start[doc + 1]
    assert pieces.counts["split"] == sum(n > max_length for n in lengths)
    assert pieces.counts["too_short"] == sum(n < 2 for n in lengths)


@settings(deadline=None)
@given(lengths=document_lengths, max_length=st.integers(2, 12))
def test_truncate_and_drop_keep_what_they_say(lengths, max_length):
    lengths = [*lengths, 2]
    doc_start = starts(lengths)
    long = [n for n in lengths if n > max_length]
    cases = {
        "truncate": [(s, min(n, max_length)) for s, n in zip(doc_start, lengths, strict=False) if n >= 2],
        "drop": [(s, n) for s, n in zip(doc_start, lengths, strict=False) if 2 <= n <= max_length],
    }
    lost = {"truncate": sum(long) - max_length * len(long), "drop": sum(long)}
    for overlong, wanted in cases.items():
        pieces = cut(doc_start, max_length, overlong)
        assert list(zip(pieces.start, pieces.length, strict=True)) == wanted
        assert pieces.counts["tokens_cut"] == lost[overlong]
        assert pieces.counts[{"truncate": "truncated", "drop": "dropped"}[overlong]] == len(long)
        assert pieces.counts["split"] == 0


def test_what_is_said_of_overlong_documents():
    doc_start = starts([3, 9, 1, 12, 13, 14])

    def where(document: int) -> str:
        return f"a:{document}"

    short = "left out 1 document(s) of fewer than two tokens: nothing to predict"
    assert cut(doc_start, 5, "split", where).lines(5) == [
        "split 4 document(s) longer than 5 tokens (a:1, a:3, a:4, …)",
        short,
    ]
    assert cut(doc_start, 12, "drop", where).lines(12) == [
        "dropped 2 document(s) longer than 12 tokens, 27 tokens lost (a:4, a:5)",
        short,
    ]
    assert cut(doc_start, 5, "truncate").lines(5) == [
        "truncated 4 document(s) longer than 5 tokens, 28 tokens lost",
        short,
    ]
    assert cut(starts([3, 4]), 5, "error").lines(5) == []


@pytest.mark.parametrize(
    ("lengths", "overlong", "message", "hint"),
    [
        (
            [3, 9],
            "error",
            "1 document is longer than max_length=5; the longest, a:1, has 9 tokens",
            "overlong",
        ),
        (
            [7, 3, 1000, 9],
            "error",
            "3 documents are longer than max_length=5; the longest, a:2, has 1,000",
            "split",
        ),
        (
            [7, 8],
            "drop",
            "no document is left to train on (dropped 2 document(s) longer than 5",
            "max_length",
        ),
        ([1, 0], "split", "no document is left to train on (left out 2 document(s) of fewer", "more data"),
    ],
)
def test_cut_refuses(lengths, overlong, message, hint):
    with pytest.raises(UserError) as caught:
        cut(starts(lengths), 5, overlong, lambda document: f"a:{document}")
    assert caught.value.message.startswith(message)
    assert hint in (caught.value.hint or "")


def test_nonsense_is_a_bug():
    with pytest.raises(ValueError, match="overlong='cut'"):
        cut(starts([3]), 5, "cut")
    with pytest.raises(ValueError, match="max_length=1"):
        cut(starts([3]), 1, "split")
    with pytest.raises(ValueError, match="lengths from 3 to 9"):
        pack(np.array([3, 9]), 8)


def naive_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """Rooms left in the rows, by the definition: one piece after the other, longest first."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - length)
        else:
            rooms.append(max_length - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), spare=st.integers(0, 30))
def test_pack_is_best_fit_decreasing(lengths, spare):
    max_length = max(lengths, default=1) + spare
    sizes = np.array(lengths, dtype=np.int64)
    rows = pack(sizes, max_length)
    assert sorted(rows.pieces.tolist()) == list(range(len(lengths)))
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(lengths)
    filled = [int(sizes[rows[r]].sum()) for r in range(len(rows))]
    assert sorted(max_length - total for total in filled) == naive_best_fit(lengths, max_length)
    for r in range(len(rows)):
        assert rows[r].tolist() == sorted(rows[r].tolist())
    firsts = [int(rows[r][0]) for r in range(len(rows))]
    assert firsts == sorted(firsts)
    assert np.array_equal(pack(sizes, max_length).pieces, rows.pieces)


def test_rows_are_full_and_a_million_pieces_take_seconds():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 1.2, 1_000_000).astype(int) + 2, 1024)
    began = time.process_time()
    rows = pack(lengths, 1024)
    assert time.process_time() - began < 10
    assert rows.fill(lengths, 1024) > 0.99


def test_unpacked():
    rows = unpacked(3)
    assert [rows[r].tolist() for r in range(len(rows))] == [[0], [1], [2]]
    assert rows.fill(np.array([2, 4, 6]), 8) == 0.5
    assert pack(np.array([], dtype=np.int64), 8).fill(np.array([]), 8) == 0.0


def test_text_bytes_of_all_pieces_are_those_of_the_documents():
    doc_start, doc_bytes = starts([30, 2, 7]), np.array([100, 3, 11])
    pieces = cut(doc_start, 6, "split")
    shares = text_bytes(pieces, doc_start, doc_bytes)
    assert np.bincount(pieces.doc, shares) == pytest.approx(doc_bytes)
    assert shares[0] == pytest.approx(100 * 5 / 29)
