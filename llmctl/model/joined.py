"""Projections of the same input as one product, for a model that is only used.

At one token a call costs as much as its arithmetic, so one product is cheaper than three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class Joined(nn.Module):
    """Several linear layers side by side: one product, whose outputs are given apart."""

    def __init__(self, whole: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.whole, self.widths = whole, list(widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.widths, dim=-1)


class Joinable(nn.Module):
    """A module some of whose linear layers read the same input.

    `projections` are their names. `projected` gives what they give, one by one or, after `join`, together.
    """

    projections: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.joined: Joined | None = None

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of each projection."""
        if self.joined is not None:
            return self.joined(x)
        return tuple(getattr(self, name)(x) for name in self.projections)

    def join(self, whole: nn.Module, widths: Sequence[int]) -> None:
        """Put one layer in the place of all projections; `widths` are theirs."""
        for name in self.projections:
            setattr(self, name, None)
        self.joined = Joined(whole, widths)
