"""How fast this machine multiplies matrices, measured in a fraction of a second."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import linear

BUDGET = 0.15  # seconds that a measurement takes


def product_rate(device: torch.device, dtype: torch.dtype, rows: int, width: int, inner: int) -> float:
    """FLOP/s of `rows` vectors of `width` channels times a matrix to `inner`, the best of several tries.

    One row is what decoding does; there the rate is that at which weights are read.
    """
    x_RD = torch.randn(rows, width, device=device).to(dtype)
    weight_ID = torch.randn(inner, width, device=device).to(dtype)
    linear(x_RD, weight_ID)
    best, end = float("inf"), time.perf_counter() + BUDGET
    while time.perf_counter() < end:
        started = time.perf_counter()
        linear(x_RD, weight_ID)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * width * inner / best
