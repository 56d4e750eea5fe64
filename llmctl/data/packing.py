"""From documents to rows: cut what is too long, then fill rows with whole pieces."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmctl.errors import UserError

EXAMPLES = 3
OVERLONG = ("error", "drop", "truncate", "split")


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens that are trained as they stand, all int64 [P], in the order of the text.

    Args:
        start: offset of the first token in the ids of the data set.
        length: tokens, at least 2. The first is never a label.
        doc: number of the document.
        counts: what happened to documents: `documents` read, `long` ones, `split`, `truncated`, `dropped`, `too_short`
            (fewer than two tokens), and `tokens_cut` by truncating and dropping.
        examples: places of the first few documents that were too long.
    """

    start: np.ndarray
    length: np.ndarray
    doc: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def trained_tokens(self) -> int:
        """Labels in all pieces: every token but a piece's first."""
        return int(self.length.sum()) - len(self)

    def take(self, chosen: np.ndarray) -> Pieces:
        """Some of the pieces, by index or mask, without counts."""
        return Pieces(self.start[chosen], self.length[chosen], self.doc[chosen])

    def lines(self, max_length: int) -> list[str]:
        """What was done to over-long and empty documents, a sentence a line; nothing if nothing was."""
        lost = f", {self.counts['tokens_cut']:,} tokens lost" if self.counts.get("tokens_cut") else ""
        more = ", …" if self.counts.get("long", 0) > len(self.examples) else ""
        places = f" ({', '.join(self.examples)}{more})" if self.examples else ""
        longer = f"{{:,}} document(s) longer than {max_length:,} tokens{lost}{places}"
        words = {
            "split": f"split {longer}",
            "truncated": f"truncated {longer}",
            "dropped": f"dropped {longer}",
            "too_short": "left out {:,} document(s) of fewer than two tokens: nothing to predict",
        }
        return [text.format(self.counts[key]) for key, text in words.items() if self.counts.get(key)]


@dataclass(frozen=True)
class Rows:
    """Which pieces stand in each row: row r holds pieces[offsets[r]:offsets[r+1]].

    Args:
        offsets: int64 [R+1].
        pieces: int64 [P], indices of pieces; ascending within a row.
    """

    offsets: np.ndarray
    pieces: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.pieces[self.offsets[row] : self.offsets[row + 1]]

    def first(self, count: int) -> Rows:
        """The first `count` rows, or all if there are fewer."""
        offsets = self.offsets[: count + 1]
        return Rows(offsets, self.pieces[: offsets[-1]])

    def fill(self, lengths: np.ndarray, max_length: int) -> float:
        """Share of the places in all rows that hold a token."""
        return float(lengths[self.pieces].sum() / (len(self) * max_length)) if len(self) else 0.0


def cut(
    doc_start: np.ndarray,
    max_length: int,
    overlong: str,
    where: Callable[[int], str] | None = None,
) -> Pieces:
    """Documents as pieces of at most `max_length` tokens.

    Under `split` a piece begins with the last token of the piece before it, so that every token of a
    document but its first is a label exactly once.

    Args:
        doc_start: int64 [D+1] offsets.
        overlong: what to do with a longer document: error, drop, truncate or split.
        where: names a document in the error, as `Shards.where` does.

    Raises:
        UserError: under `error`, if a document is longer; and if no piece is left.
    """
    if max_length < 2 or overlong not in OVERLONG:
        raise ValueError(f"max_length={max_length}, overlong={overlong!r}")
    start = np.asarray(doc_start[:-1], dtype=np.int64)
    tokens = np.diff(np.asarray(doc_start, dtype=np.int64))
    long = tokens > max_length
    short = tokens < 2
    if overlong == "error" and long.any():
        raise _too_long(tokens, max_length, where)
    number = np.ones_like(tokens)
    if overlong == "split":
        number[long] += -((max_length - tokens[long]) // (max_length - 1))  # rounded up
    elif overlong == "drop":
        number[long] = 0
    number[short] = 0
    doc = np.repeat(np.arange(len(tokens), dtype=np.int64), number)
    order = np.arange(len(doc), dtype=np.int64) - np.repeat(np.cumsum(number) - number, number)
    offset = order * (max_length - 1)
    length = np.minimum(max_length, tokens[doc] - offset)
    counts = _counts(tokens, max_length, overlong)
    examples = [] if where is None else [where(int(d)) for d in np.flatnonzero(long)[:EXAMPLES]]
    pieces = Pieces(start[doc] + offset, length, doc, counts, examples)
    if not len(pieces):
        raise UserError(
            f"no document is left to train on ({'; '.join(pieces.lines(max_length)) or 'there is none'})",
            "raise data.max_length (up to the context of the model), set data.overlong=split, or give more data",
        )
    return pieces


def _counts(tokens: np.ndarray, max_length: int, overlong: str) -> dict[str, int]:
    long = tokens[tokens > max_length]
    lost = {"drop": long.sum(), "truncate": (long - max_length).sum()}
    return {
        "documents": len(tokens),
        "long": len(long),
        "split": len(long) * (overlong == "split"),
        "truncated": len(long) * (overlong == "truncate"),
        "dropped": len(long) * (overlong == "drop"),
        "too_short": int((tokens < 2).sum()),
        "tokens_cut": int(lost.get(overlong, 0)),
    }


def _too_long(tokens: np.ndarray, max_length: int, where: Callable[[int], str] | None) -> UserError:
    longest = int(tokens.argmax())
    place = where(longest) if where else f"document {longest}"
    count = int((tokens > max_length).sum())
    verb = "document is" if count == 1 else "documents are"
    return UserError(
        f"{count:,} {verb} longer than max_length={max_length}; the longest, {place}, "
        f"has {int(tokens[longest]):,} tokens",
        "set data.overlong to split, truncate or drop, or raise data.max_length (up to the context of the model)",
    )


def unpacked(n: int) -> Rows:
    """One piece a row."""
    return Rows(np.arange(n + 1, dtype=np.int64), np.arange(n, dtype=np.int64))


def pack(lengths: np.ndarray, max_length: int) -> Rows:
    """Best-fit decreasing: each piece, longest first, goes where it leaves the least room.

    Rows with equal room are alike and so are pieces of equal length; they are moved together, and the
    work grows with the number of distinct lengths, not with their product with the rows. Rows come in
    the order of their first piece.

    Args:
        lengths: int64 [P], each between 1 and max_length.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= max_length:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, max_length={max_length}")
    by_length = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    open_rows = _OpenRows()
    done = 0
    for length, count in zip(
        *(part[::-1].tolist() for part in np.unique(lengths, return_counts=True)), strict=True
    ):
        rows = open_rows.place(length, count, max_length)
        row_of[by_length[done : done + count]] = rows
        done += count
    return _in_order(row_of)


class _OpenRows:
    """Rows that still have room, grouped by how much."""

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys of _rows, ascending
        self._made = 0

    def place(self, length: int, count: int, max_length: int) -> np.ndarray:
        """The row of each of `count` pieces of `length`, int64 [count]."""
        placed: list[np.ndarray] = []
        while count:
            room = self._best(length)
            if room is None:
                room = max_length
                needed = -(-count // (max_length // length))
                self._keep(room, list(range(self._made + needed - 1, self._made - 1, -1)))
                self._made += needed
            rows = self._rows[room]
            each = room // length
            number = min(len(rows), count // each)
            if number == 0:  # fewer pieces are left than one row would take
                each, number = count, 1
            taken = rows[-number:][::-1]
            del rows[-number:]
            if not rows:
                del self._rows[room], self._rooms[bisect_left(self._rooms, room)]
            self._keep(room - each * length, taken)
            placed.append(np.repeat(np.array(taken, dtype=np.int64), each))
            count -= number * each
        return np.concatenate(placed)

    def _best(self, length: int) -> int | None:
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def _keep(self, room: int, rows: list[int]) -> None:
        if room and rows:
            if room not in self._rows:
                self._rows[room] = []
                insort(self._rooms, room)
            self._rows[room] += rows


def _in_order(row_of: np.ndarray) -> Rows:
    """Rows numbered by their first piece, the pieces of each in the order of the text."""
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    row_of = rank[row_of]
    offsets = np.zeros(len(first) + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=len(first)), out=offsets[1:])
    return Rows(offsets, np.argsort(row_of, kind="stable").astype(np.int64))


def text_bytes(pieces: Pieces, doc_start: np.ndarray, doc_bytes: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that the labels of each piece stand for, float64 [P].

    A document's bytes are shared out over its labels, so all pieces of a document together have exactly
    its bytes: the denominator of bits per byte.
    """
    labels = np.diff(np.asarray(doc_start, dtype=np.int64))[pieces.doc] - 1
    return np.asarray(doc_bytes)[pieces.doc] * ((pieces.length - 1) / labels)
