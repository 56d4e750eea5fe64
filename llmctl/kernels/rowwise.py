"""Small per-token operations with hand-written gradients: fewer passes over memory than autograd's.

On the CPU each elementwise operation is a trip to memory, and autograd's composite backward makes
about twice as many of them (`benchmarks/rowwise_cpu.py`). On other devices torch's own fused kernels
run, and a compiler that fuses by itself is given the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in the dtype of `x` (sums in float32)."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    # autograd's bookkeeping takes longer than the norm of one token
    normed = _RMSNorm.apply if torch.is_grad_enabled() else _normed
    return normed(x.float(), weight.float(), eps).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, term by term."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of `x` [..., D] by the angles whose cos and sin [..., D/2] are given.

    The tables broadcast over the leading axes. The result is float32, or float64 for such input.
    """
    if is_compiling():
        return rotate_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin, 1.0)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition: a rotation matrix for each pair (Su et al. 2021, arXiv:2104.09864)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * _inverse_norm(x, eps)).mul_(weight)


def _inverse_norm(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_norm(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        d_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        scaled = grad * weight
        along = (scaled * unit).mean(-1, keepdim=True)
        return scaled.addcmul_(unit, along, value=-1).mul_(inverse), d_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # the inverse of a rotation is the rotation back
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0).to(ctx.dtype), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
    (left, right), (out_left, out_right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left)
    out_left.addcmul_(right.to(out.dtype), sin, value=-direction)
    torch.mul(right, cos, out=out_right)
    out_right.addcmul_(left.to(out.dtype), sin, value=direction)
    return out
