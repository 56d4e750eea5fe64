"""A frozen matrix and the low-rank adapter beside it, as one operation with a hand-written gradient.

Written with torch's own operations, the adapter costs more in passes over activations of full width (a cast, a
product with the scale, a sum, and the same backwards) than in its thin products. Here the sums are part of the
products and the scale is applied to the R channels in the middle.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ for `x` [..., I], with gradients for x, A and B alone (arXiv:2106.09685).

    Under autocast the products run in the autocast dtype, which the result [..., O] has too; else in that of `x`.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _LoraLinear.apply(x, w_OI, bias_O, a_RI, b_OR, scale, dtype)


def lora_linear_reference(
    x: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """The definition, term by term."""
    return F.linear(x, w_OI, bias_O) + scale * F.linear(F.linear(x, a_RI), b_OR)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
            w, a, b = w_OI.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
            low_NR = x_NI @ a.T
            out_NO = F.linear(x_NI, w, None if bias_O is None else bias_O.to(dtype))
            out_NO.addmm_(low_NR, b.T, alpha=scale)
        ctx.save_for_backward(x_NI, low_NR, w, a, b)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a_RI.dtype, b_OR.dtype)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None]:
        x_NI, low_NR, w, a, b = ctx.saved_tensors
        of_x, of_a, of_b = ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            grad_NO = grad.reshape(-1, grad.shape[-1])
            d_low_NR = (grad_NO @ b).mul_(ctx.scale)
            d_b = (grad_NO.T @ low_NR).to(of_b).mul_(ctx.scale)
            d_a = (d_low_NR.T @ x_NI).to(of_a)
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = (grad_NO @ w).addmm_(d_low_NR, a).to(of_x).view(ctx.shape)
        return d_x, None, None, d_a, d_b, None, None
