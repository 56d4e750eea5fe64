"""What a mixer remembers between passes. The block never looks inside.

Shape legend: B rows, G key/value heads, T new tokens, S all tokens so far, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class State(Protocol):
    """Memory of one mixer for B rows."""

    length: int

    @property
    def rows(self) -> int:
        """How many rows it remembers."""

    def reserve(self, length: int, most: int) -> None:
        """Make room for `length` tokens at once, and for as many again but no more than `most` in all."""

    def cut(self, length: int) -> int:
        """Forget all but the first `length` tokens; returns how many are left, which may be fewer."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was: beams, and rows that are repeated or dropped."""


class KeyValueState(Protocol):
    """Memory of an attention mixer: a tensor a token for each of its parts, here keys and values."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add the new tokens' parts, [B, heads, T, width] each; return all of them, [B, heads, S, width]."""


class TokenState:
    """Something of every token, in blocks of memory written in place: no copy of the past at each step.

    It grows by doubling when it is full.
    """

    def __init__(
        self,
        rows: int,
        parts: Sequence[tuple[int, int]],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`parts` are the (heads, width) of what is kept of a token."""
        self.parts = [
            torch.empty((rows, heads, capacity, width), dtype=dtype, device=device) for heads, width in parts
        ]
        self.length = 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        end = self.length + new[0].shape[2]
        if end > self.parts[0].shape[2]:
            self._grow(max(end, 2 * self.length))
        for part, added in zip(self.parts, new, strict=True):
            part[:, :, self.length : end] = added
        self.length = end
        return tuple(part[:, :, :end] for part in self.parts)

    def reserve(self, length: int, most: int) -> None:
        capacity = self.parts[0].shape[2]
        if length > capacity:
            self._grow(max(length, min(2 * capacity, most)))

    def cut(self, length: int) -> int:
        self.length = min(self.length, length)
        return self.length

    def reorder(self, rows: Tensor) -> None:
        self.parts = [part.index_select(0, rows.to(part.device)) for part in self.parts]

    @property
    def rows(self) -> int:
        return self.parts[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are held."""
        return sum(part[:, :, : self.length].nbytes for part in self.parts)

    def _grow(self, capacity: int) -> None:
        for index, part in enumerate(self.parts):
            rows, heads, _, width = part.shape
            larger = part.new_empty((rows, heads, capacity, width))
            larger[:, :, : self.length] = part[:, :, : self.length]
            self.parts[index] = larger


class RecurrentState:
    """A fixed number of tensors, whatever the length: what a state-space layer carries on.

    The past cannot be taken back out of it, so to cut it is to forget everything.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = list(tensors)
        self.length = 0

    def update(self, tokens: int, *tensors: Tensor) -> None:
        """The tensors after `tokens` more tokens."""
        self.tensors = list(tensors)
        self.length += tokens

    def reserve(self, length: int, most: int) -> None:
        """Nothing: it is of the same size for every length."""

    def cut(self, length: int) -> int:
        if length < self.length:
            self.tensors = [torch.zeros_like(tensor) for tensor in self.tensors]
            self.length = 0
        return self.length

    def reorder(self, rows: Tensor) -> None:
        self.tensors = [tensor.index_select(0, rows.to(tensor.device)) for tensor in self.tensors]

    @property
    def rows(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return sum(tensor.nbytes for tensor in self.tensors)


class FixedPast:
    """A past that is read and never written: learned prefixes, and passes that may be recomputed.

    Activation checkpointing runs a block twice; a state that grew at each run would show the block
    its own tokens twice.
    """

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.length = parts[0].shape[2]

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.cat((old.to(part.dtype), part), dim=2) for old, part in zip(self.parts, new, strict=True)
        )
