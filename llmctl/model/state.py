"""What a mixer remembers between passes. The block never looks inside.

Shape legend: B rows, G key/value heads, T new tokens, S all tokens so far, D head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class KeyValueState(Protocol):
    """Memory of an attention mixer."""

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values; return all of them, [B, G, S, D] each."""


class DenseState:
    """Keys and values in one block of memory, written in place: no copy of the past at each step."""

    def __init__(
        self, shape_BGSD: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.empty(shape_BGSD, dtype=dtype, device=device)
        self.values = torch.empty(shape_BGSD, dtype=dtype, device=device)
        self.length = 0

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k_BGTD.shape[2]
        assert end <= self.keys.shape[2], "the state was made too small for these tokens"
        self.keys[:, :, self.length : end] = k_BGTD
        self.values[:, :, self.length : end] = v_BGTD
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class FixedPast:
    """A past that is read and never written: learned prefixes, and passes that may be recomputed.

    Activation checkpointing runs a block twice; a state that grew at each run would show the block
    its own tokens twice.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys, self.values = keys, values

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return k_BGTD, v_BGTD
        return (
            torch.cat((self.keys.to(k_BGTD.dtype), k_BGTD), dim=2),
            torch.cat((self.values.to(v_BGTD.dtype), v_BGTD), dim=2),
        )
