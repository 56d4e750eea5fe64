"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.kernels.rowwise import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm1p(nn.Module):
    """RMSNorm whose weight is 1 + shift, so that weight decay draws it to 1 (Gemma, arXiv:2403.08295)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # in float32: near 1, bfloat16 has no room for a small shift
        return rms_norm(x.float(), 1.0 + self.shift.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.shift.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) · weight + bias, over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape
        return F.layer_norm(x.float(), size, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "rmsnorm1p": RMSNorm1p,
    "layernorm": LayerNorm,
}
