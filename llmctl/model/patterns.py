"""Attention patterns: which positions a query may look at, besides causality and documents.

A pattern is a predicate over positions, never over storage places, so the same lines give the dense
mask, a block mask, and the row of one decoding step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmctl.recipe.model import ModelSection


class Pattern(Protocol):
    """Hashable, so that layers with the same pattern share one mask."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """True where the query's position may see the key's; arguments broadcast to [B, T, S]."""

    def sees_all(self, length: int) -> bool:
        """Whether the pattern hides nothing among positions 0 … length - 1 of one document."""


@dataclass(frozen=True)
class Full:
    """Every position (Vaswani et al. 2017, arXiv:1706.03762)."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query == key)

    def sees_all(self, length: int) -> bool:
        return True


@dataclass(frozen=True)
class Sliding:
    """The last `window` positions, the query's own included (Mistral 7B, arXiv:2310.06825)."""

    window: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return query - key < self.window

    def sees_all(self, length: int) -> bool:
        return length <= self.window


def _sliding(model: ModelSection) -> Pattern:
    assert model.sliding_window is not None  # the recipe check has seen to it
    return Sliding(model.sliding_window)


PATTERNS: dict[str, Callable[[ModelSection], Pattern]] = {
    "full": lambda model: Full(),
    "sliding": _sliding,
}
