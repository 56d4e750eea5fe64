"""From weights to codes when the scales are known, and how scales are chosen.

Shape legend: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.kernels.quantized import rounded_scale

SHRINKS = 36  # candidates of a scale: the one that cuts nothing, and shares of it down to 0.3
LEAST = 0.3
_TINY = torch.finfo(torch.bfloat16).tiny


def code_range(bits: int) -> tuple[int, int]:
    """Least and greatest code of `bits` bits with sign."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def group_size(inputs: int, group: int | None) -> int:
    """Inputs that share a scale; all of a row where `group` is None. Raises ValueError if they do not divide it."""
    if group is not None and (group < 1 or inputs % group):
        raise ValueError(f"{inputs} inputs in groups of {group}")
    return group or inputs


def absmax_scale(weight_OGI: Tensor, bits: int) -> Tensor:
    """Scales [O, G] at which the largest weight of a group [O, G, I/G] gets the greatest code; 1 where all are 0."""
    return _stored(weight_OGI.abs().amax(-1) / code_range(bits)[1])


def minmax_scale(weight_OGI: Tensor, bits: int, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scales and zeros [O, G] at which the codes reach from the least weight of a group to its greatest, and 0.

    `shrink` makes both ends as much smaller. Zeros are whole numbers in the range of the codes, float32.
    """
    low, high = code_range(bits)
    least = weight_OGI.amin(-1).clamp(max=0) * shrink
    scale = _stored((weight_OGI.amax(-1).clamp(min=0) * shrink - least) / (high - low))
    return scale, (low - least / scale).round().clamp(low, high)


def best_scale(
    weight_OI: Tensor, importance_I: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """The scales [O, G], and zeros unless symmetric, with the least error among shrunk ranges.

    Cutting off the largest weights of a group makes the steps between all others smaller, and that is
    worth it the more, the fewer the bits. The error of a candidate is sum_i importance_i · (w_i - q_i)².
    """
    weight = weight_OI.unflatten(1, (-1, group))
    importance = importance_I.unflatten(0, (-1, group))
    whole = absmax_scale(weight, bits)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(whole, torch.inf)
    for shrink in torch.linspace(1, LEAST, SHRINKS).tolist():
        if symmetric:
            scale, zero = rounded_scale((whole * shrink).clamp(min=_TINY)), torch.zeros_like(whole)
        else:
            scale, zero = minmax_scale(weight, bits, shrink)
        error = (rounded(weight, scale[..., None], zero[..., None], bits) - weight).square_()
        total = error.mul_(importance).sum(-1)
        better = total < least
        least = torch.where(better, total, least)
        kept = best or (scale, zero)
        best = (torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1]))
    assert best is not None
    return best[0], None if symmetric else best[1]


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """The nearest code of every weight, as whole numbers in the type of the weights."""
    return (weight / scale).round_().add_(zero).clamp_(*code_range(bits))


def rounded(weight: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """Every weight as its nearest code stands for it."""
    return codes_of(weight, scale, zero, bits).sub_(zero).mul_(scale)


def _stored(scale: Tensor) -> Tensor:
    # a row of zeros needs some scale, and one too small for bfloat16 would divide by zero
    return rounded_scale(torch.where(scale > 0, scale.clamp(min=_TINY), 1.0))
