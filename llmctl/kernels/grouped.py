"""One product for tokens that are sorted by the matrix they meet: the experts of a layer.

Shape legend: N tokens, sorted by expert; X experts; E inputs; O outputs.

Paths, equal to each other:

    looped    a product for each expert that has tokens: the definition
    grouped   torch's grouped product over the stacked matrices, one kernel on a CUDA device
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 8  # the grouped kernel wants rows of a multiple of 16 bytes


def grouped_linear(x_NE: Tensor, weights: Sequence[Tensor], counts_X: Tensor) -> Tensor:
    """[N, O]: the first counts[0] tokens times the first matrix [O, E], the next counts[1] times the second, …

    `counts` are integers that sum to N, on any device; the loop reads them on the host. An expert without tokens gets
    no gradient from the loop, and one of zeros from the grouped kernel. Under autocast both multiply in its dtype.
    """
    path = _grouped if _has_kernel(x_NE, weights[0]) else _looped
    return path(x_NE, weights, counts_X)


def _has_kernel(x_NE: Tensor, weight_OE: Tensor) -> bool:
    if not x_NE.is_cuda or _dtype(x_NE) != torch.bfloat16:
        return False
    aligned = all(size % ALIGNED == 0 for size in weight_OE.shape)
    return aligned and torch.cuda.get_device_capability(x_NE.device) >= (8, 0)


def _dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _looped(x_NE: Tensor, weights: Sequence[Tensor], counts_X: Tensor) -> Tensor:
    counts = counts_X.tolist()
    parts = [
        F.linear(x, weight)
        for x, weight, count in zip(x_NE.split(counts), weights, counts, strict=True)
        if count
    ]
    return torch.cat(parts) if parts else F.linear(x_NE, weights[0])


def _grouped(x_NE: Tensor, weights: Sequence[Tensor], counts_X: Tensor) -> Tensor:
    dtype = _dtype(x_NE)
    stacked_XEO = torch.stack([weight.to(dtype) for weight in weights]).transpose(1, 2)
    ends_X = counts_X.to(x_NE.device).cumsum(0).int()
    return F.grouped_mm(x_NE.to(dtype), stacked_XEO, offs=ends_X)
