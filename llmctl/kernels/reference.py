"""The definition of attention, which every fast path is tested against.

Shape legend: B rows, H query heads, G key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_reference(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BTS: Tensor) -> Tensor:
    """The definition, step by step: scores, mask, softmax, weighted sum (Vaswani et al. 2017)."""
    repeat = q_BHTD.shape[1] // k_BGSD.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k_BGSD, v_BGSD))
    scores = q_BHTD @ k.transpose(-1, -2) / math.sqrt(q_BHTD.shape[-1])
    scores = scores.masked_fill(~mask_BTS[:, None], -torch.inf)
    return scores.softmax(-1) @ v
