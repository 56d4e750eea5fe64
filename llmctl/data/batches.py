"""From rows to tensors: what a step trains on is a pure function of the step's number.

Nothing is remembered between steps, so a resumed run needs its step and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from llmctl.data.packing import Pieces, Rows
from llmctl.errors import UserError

IGNORE = -100  # the label that no loss counts, as in Hugging Face models
FEWEST_DOCUMENTS = 20  # with fewer, held-out text is the tail of the data instead of whole documents

Batch = dict[str, torch.Tensor]


class TooLittle(UserError):
    """Nothing can be held out. The hint is for a stage that trains."""


@dataclass(frozen=True)
class Laid:
    """Token ids, the pieces of them that are trained as they stand, and the rows the pieces lie in.

    Args:
        ids: token ids of the data set [N], any integer type; may be memory-mapped.
        trained: bool [N], the places that are labels; None where all are. A piece's first never is.
        ended: bool [P], whether the last token of a piece is the end token that was put after its document, which
            stands for no text; None where nobody asks.
    """

    ids: np.ndarray
    pieces: Pieces
    rows: Rows
    trained: np.ndarray | None = None
    ended: np.ndarray | None = None

    @property
    def trained_tokens(self) -> int:
        """Labels in all rows."""
        pieces = self.pieces.take(self.rows.pieces)
        return pieces.trained_tokens if self.trained is None else int(labels_of(pieces, self.trained).sum())


def labels_of(pieces: Pieces, trained: np.ndarray) -> np.ndarray:
    """Labels in each piece, int64 [P]: the trained places, but never a piece's first."""
    before = np.zeros(len(trained) + 1, dtype=np.int64)
    np.cumsum(trained, out=before[1:])
    return before[pieces.start + pieces.length] - before[pieces.start + 1]


class Batches:
    """The rows of a data set as micro-batches, epoch after epoch, each epoch in another order.

    Args:
        batch_size: rows in a micro-batch.
        accumulation: micro-batches in an optimizer step.
        seed: of the order; the order depends on nothing else but the epoch.
        shuffle: False keeps the rows as they come.
        isolate: position ids restart at every piece, which is how the model knows that pieces must
            not see each other.

    Raises:
        ValueError: there is no row, or a row is longer than max_length.
    """

    def __init__(
        self,
        laid: Laid,
        *,
        max_length: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        isolate: bool = True,
    ) -> None:
        pieces, rows = laid.pieces, laid.rows
        if not len(rows):
            raise ValueError("no rows")
        longest = int(np.add.reduceat(pieces.length[rows.pieces], rows.offsets[:-1]).max())
        if longest > max_length:
            raise ValueError(f"a row of {longest} tokens, max_length={max_length}")
        self._laid = laid
        self._batch_size, self._accumulation = batch_size, accumulation
        self._seed, self._shuffle = seed, shuffle
        self._pad_id, self._isolate = pad_id, isolate
        self._last: tuple[int, np.ndarray] | None = None  # the order of the epoch asked for last

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return len(self._laid.rows)

    @property
    def trained_tokens(self) -> int:
        """Labels in an epoch."""
        return self._laid.trained_tokens

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one may have fewer rows."""
        return -(-self.rows // (self._batch_size * self._accumulation))

    def step(self, i: int) -> list[Batch]:
        """The micro-batches of optimizer step i, counted from 0 over all epochs."""
        if i < 0:
            raise ValueError(f"step {i}")
        epoch, place = divmod(i, self.steps_per_epoch)
        per_step = self._batch_size * self._accumulation
        chosen = self._order(epoch)[place * per_step : (place + 1) * per_step]
        return [
            collate(
                self._laid, chosen[at : at + self._batch_size], pad_id=self._pad_id, isolate=self._isolate
            )
            for at in range(0, len(chosen), self._batch_size)
        ]

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.rows)
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, np.argsort(_hashes(self.rows, self._seed, epoch), kind="stable"))
        return self._last[1]


def collate(laid: Laid, chosen: Iterable[int], *, pad_id: int, isolate: bool = True) -> Batch:
    """One micro-batch of the `chosen` rows, padded on the right to its longest row.

    Returns:
        input_ids [B, T] int64; labels [B, T] int64, in the places of input_ids (the model shifts them),
        -100 at places that are not trained, at the first token of every piece and at padding;
        position_ids [B, T] int64, from 0 at every piece (at every row if not `isolate`) and from 0
        again at padding; attention_mask [B, T] int64, 1 at tokens and 0 at padding; if the rows know which pieces
        are `ended`, is_end [B, T] bool, True at their end tokens.
    """
    pieces, rows = laid.pieces, [laid.rows[row] for row in chosen]
    lengths = [int(pieces.length[row].sum()) for row in rows]
    shape = (len(rows), max(lengths))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    is_end = np.zeros(shape, dtype=bool)
    for number, (row, filled) in enumerate(zip(rows, lengths, strict=True)):
        at = 0
        if laid.ended is not None:
            is_end[number, np.cumsum(pieces.length[row]) - 1] = laid.ended[row]
        for start, length in zip(pieces.start[row].tolist(), pieces.length[row].tolist(), strict=True):
            place = slice(at, at + length)
            input_ids[number, place] = laid.ids[start : start + length]
            labels[number, place] = input_ids[number, place]
            if laid.trained is not None:
                labels[number, place][~laid.trained[start : start + length]] = IGNORE
            labels[number, at] = IGNORE
            if isolate:
                position_ids[number, at : at + length] = np.arange(length)
            at += length
        if not isolate:
            position_ids[number, :at] = np.arange(at)
        position_ids[number, filled:] = np.arange(shape[1] - filled)
        attention_mask[number, :filled] = 1
    batch = {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "attention_mask": torch.from_numpy(attention_mask),
    }
    return batch if laid.ended is None else batch | {"is_end": torch.from_numpy(is_end)}


def eval_batches(
    laid: Laid, *, batch_size: int, pad_id: int, max_rows: int | None = None, isolate: bool = True
) -> Iterator[Batch]:
    """Every row once, in order, for evaluation; only the first `max_rows` if that is given."""
    count = len(laid.rows) if max_rows is None else min(max_rows, len(laid.rows))
    for at in range(0, count, batch_size):
        yield collate(laid, range(at, min(at + batch_size, count)), pad_id=pad_id, isolate=isolate)


def split_holdout(pieces: Pieces, fraction: float, seed: int) -> tuple[Pieces, Pieces]:
    """Pieces to train on, and a share of about `fraction` to evaluate on.

    With 20 documents or more, whole documents are held out, chosen by a hash of the seed and the
    document's number; with fewer, the last pieces of the data. At least one of them is held out unless
    `fraction` is 0, and at least one is left.

    Raises:
        TooLittle: there is only one piece, so nothing can be held out.
    """
    everything = np.arange(len(pieces))
    if fraction == 0:
        return pieces.take(everything), pieces.take(everything[:0])
    if len(pieces) < 2:
        raise TooLittle(
            "too little text to hold any out for evaluation: it fits in one row",
            "give more data, name evaluation data in data.eval, or set data.eval_fraction=0",
        )
    docs = np.unique(pieces.doc)
    if len(docs) < FEWEST_DOCUMENTS:
        held = everything >= len(pieces) - _share(len(pieces), fraction)
    else:
        order = np.argsort(_hashes(int(docs[-1]) + 1, seed, 0)[docs], kind="stable")
        held = np.isin(pieces.doc, docs[order[: _share(len(docs), fraction)]])
    return pieces.take(~held), pieces.take(held)


def _share(number: int, fraction: float) -> int:
    return min(number - 1, max(1, round(number * fraction)))


def _hashes(count: int, seed: int, stream: int) -> np.ndarray:
    """A fixed pseudo-random uint64 for each of 0 … count-1 (SplitMix64, Steele et al. 2014).

    Written out, because no library promises the same permutation in its next version, and a resumed
    run may meet another version.
    """
    with np.errstate(over="ignore"):
        base = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(stream))
        return _mix(base + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
