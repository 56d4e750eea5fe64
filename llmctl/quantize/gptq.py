"""GPTQ: columns are rounded one after the other, and the rest makes good for the error of each.

Frantar et al. 2022 (arXiv:2210.17323). Shape legend: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.kernels.quantized import Quantized
from llmctl.quantize.scales import best_scale, code_range, group_size, rounded

GROWTH = 10.0  # of the damping when a Hessian cannot be factored
MOST_DAMPING = 10.0


class Singular(ValueError):
    """A Hessian that no damping within the bound makes positive definite."""


@dataclass(frozen=True)
class Gptq:
    """How to quantize.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; None gives every output one.
        symmetric: codes stand around 0; otherwise every group has a zero of its own.
        act_order: take the columns with the largest inputs first, while all others can still make good for
            them. The groups stay where they are, so what is stored does not depend on the order.
        damping: what is added to the diagonal of the Hessian, as a share of its mean.
        block: columns after which the error is passed on to all that are left; the result does not depend on it.
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = True
    act_order: bool = True
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.block < 1:
            raise ValueError(f"damping={self.damping}, block={self.block}")


@dataclass(frozen=True)
class _Problem:
    """One layer made ready.

    Attributes:
        weight_OI, hessian_II: float32, or float64 where the weight was given so; no zero is on the diagonal of the Hessian.
        order: int64 [I], the columns as they are taken.
        factor_II: of the inverse Hessian in that order, see `inverse_factor`, with `damping`.
        scale_OG, zero_OG: of groups of `group` columns as they stand in the matrix.
    """

    weight_OI: Tensor
    hessian_II: Tensor
    order: Tensor
    factor_II: Tensor
    damping: float
    scale_OG: Tensor
    zero_OG: Tensor | None
    group: int

    def solved(self, dequantized_OI: Tensor, settings: Gptq) -> Quantized:
        """Codes of the weights found, which lie on the grid of the scales."""
        scale = self.scale_OG.repeat_interleave(self.group, 1)
        codes = (dequantized_OI / scale).round()
        if self.zero_OG is not None:
            codes += self.zero_OG.repeat_interleave(self.group, 1)
        codes = codes.clamp(*code_range(settings.bits)).to(torch.int8)
        zero = None if self.zero_OG is None else self.zero_OG.to(torch.int8)
        return Quantized(codes, self.scale_OG, zero, settings.bits)


def gptq(weight_OI: Tensor, hessian_II: Tensor, settings: Gptq) -> Quantized:
    """The matrix Q on its grid with a small ||XW^T - XQ^T||².

    Scales are chosen before the first column is rounded. An input that was always zero in the data is
    rounded to nearest: nothing is known of it.

    Args:
        weight_OI: of any floating type; the work is done in float64 if it is of that, else in float32.
        hessian_II: X^T X over the inputs, times any factor.

    Raises:
        ValueError: the inputs are no whole groups, or a number is not finite.
        Singular: the Hessian is not positive semidefinite.
    """
    problem = _prepare(weight_OI, hessian_II, settings)
    order, group = problem.order, problem.group
    U_II = problem.factor_II
    left_IO = problem.weight_OI.T[order].contiguous()  # columns of the matrix, each in one piece of memory
    done_IO = torch.empty_like(left_IO)
    scale_GO = problem.scale_OG.T.contiguous()
    zero_GO = None if problem.zero_OG is None else problem.zero_OG.T.contiguous()
    groups = (order // group).tolist()
    for start in range(0, len(groups), settings.block):
        stop = min(start + settings.block, len(groups))
        block_IO, U = left_IO[start:stop], U_II[start:stop, start:stop]
        errors = torch.empty_like(block_IO)
        for i, g in enumerate(groups[start:stop]):
            zero = 0.0 if zero_GO is None else zero_GO[g]
            done_IO[start + i] = rounded(block_IO[i], scale_GO[g], zero, settings.bits)
            errors[i] = (block_IO[i] - done_IO[start + i]) / U[i, i]
            block_IO[i + 1 :].addr_(U[i, i + 1 :], errors[i], alpha=-1)
        left_IO[stop:].addmm_(U_II[start:stop, stop:].T, errors, alpha=-1)
    return problem.solved(done_IO[order.argsort()].T, settings)


def gptq_reference(weight_OI: Tensor, hessian_II: Tensor, settings: Gptq) -> Quantized:
    """The definition in float64: after a column is rounded by δ_q, all that are left, F, move to where the
    output error is least: δ_F = -H_FF^-1 H_Fq δ_q."""
    problem = _prepare(weight_OI, hessian_II, settings)
    hessian = problem.hessian_II.double()
    hessian.diagonal().add_(problem.damping * hessian.diagonal().mean())
    left, done = problem.weight_OI.double(), torch.empty_like(problem.weight_OI, dtype=torch.float64)
    remaining = problem.order.tolist()
    while remaining:
        q = remaining.pop(0)
        g = q // problem.group
        zero = 0.0 if problem.zero_OG is None else problem.zero_OG[:, g].double()
        done[:, q] = rounded(left[:, q], problem.scale_OG[:, g].double(), zero, settings.bits)
        if remaining:
            F = torch.tensor(remaining, device=left.device)
            share = torch.linalg.solve(hessian[F][:, F], hessian[F, q])
            left[:, F] -= torch.outer(done[:, q] - left[:, q], share)
    return problem.solved(done, settings)


def inverse_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U, in the type of H, with U^T U = (H + d · mean(diag H) · 1)^-1; and d.

    d is `damping`, or ten times as much, as often as it takes.

    Raises Singular if more than MOST_DAMPING would be needed.
    """
    # in float64 because the condition is that of X^T X; the Apple GPU has none
    at_work = hessian_II.cpu() if hessian_II.device.type == "mps" else hessian_II
    hessian = at_work.double()
    one = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    while damping <= MOST_DAMPING:
        # Cholesky from the far corner: H = R R^T with R upper, so that U = R^-1 needs no second one
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * mean * one).flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
            return upper.to(hessian_II), damping
        damping *= GROWTH
    raise Singular(f"not positive definite with {MOST_DAMPING:g} times the mean added to its diagonal")


def _prepare(weight_OI: Tensor, hessian_II: Tensor, settings: Gptq) -> _Problem:
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    weight, hessian = weight_OI.to(wide), hessian_II.to(wide).clone()
    group = group_size(weight.shape[1], settings.group)
    if not (weight.isfinite().all() and hessian.isfinite().all()):
        raise ValueError("a weight or its Hessian is not finite")
    diagonal = hessian.diagonal()  # a view
    dead = diagonal == 0
    # any positive number does; the mean leaves the damping of the others as it is
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    order = (
        diagonal.argsort(descending=True, stable=True)
        if settings.act_order
        else torch.arange(len(diagonal), device=weight.device)
    )
    factor, damping = inverse_factor(hessian[order][:, order], settings.damping)
    # what an error in a column costs after all others have made good for it: 1 / (H^-1)_ii
    cost = 1 / factor.square().sum(0)[order.argsort()]
    cost[dead] = damping * diagonal.mean()
    scale, zero = best_scale(weight, cost, settings.bits, group, settings.symmetric)
    return _Problem(weight, hessian, order, factor, damping, scale, zero, group)
