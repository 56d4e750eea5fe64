"""Projections of the same input as one product, for a model that is only used.

At one token a call costs as much as its arithmetic, so one product is cheaper than three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# linear layers of the same input, and their biases end to end -> one layer, or None if they do not go together
Beside = Callable[[list[Any], Tensor | None], nn.Module | None]


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

    projections: tuple[str, ...] = ()

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


def join(model: nn.Module, beside: Beside) -> None:
    """Join the projections of every module of a model, in place, where `beside` makes one layer of them."""
    for module in [each for each in model.modules() if isinstance(each, Joinable) and each.joined is None]:
        parts: list[Any] = [getattr(module, name) for name in module.projections]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        if len(biases) not in (0, len(parts)):
            continue
        whole = beside(parts, torch.cat(biases) if biases else None)
        if whole is not None:
            module.join(whole, [part.out_features for part in parts])
