"""Softmax attention over what a query may see, by the fastest path the mask allows.

Shape legend: B rows, H query heads, G key/value heads, T queries, S keys, D head width.

Paths, one function each, all equal to `attend_reference`:

    open      every query sees every key (one-token decoding)
    causal    one document from position 0: the kernel's own causal flag
    spans     packed rows: each document by itself, so nothing is computed across documents
    dense     any other pattern: a boolean mask [B, 1, T, S]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What the queries of one forward pass may see, in the cheapest form that says it.

    Attributes:
        path: a key of `PATHS`.
        mask: [B or 1, 1, T, S] boolean, True where a query sees a key; `dense` only.
        spans: token counts of the documents over the flattened rows, summing to B * T; `spans` only.
    """

    path: str
    mask: Tensor | None = None
    spans: tuple[int, ...] | None = None


def attend(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible: Visibility) -> Tensor:
    """Attention output [B, H, T, D]: float32 on CPU, else in the dtype of the queries.

    H must be a multiple of G; query head h reads key head h // (H / G) (Ainslie et al. 2023,
    arXiv:2305.13245). Scores are scaled by 1 / sqrt(D).

    On CPU the work is done in float32 even under bf16 autocast: torch's bf16 flash kernel there is
    about half as fast as its float32 one (`benchmarks/attention_cpu.py`), and less precise.
    """
    path = PATHS[visible.path]
    if q_BHTD.device.type != "cpu" or q_BHTD.dtype == torch.float64:
        k_BGSD, v_BGSD = k_BGSD.to(q_BHTD.dtype), v_BGSD.to(q_BHTD.dtype)
        return path(q_BHTD, k_BGSD, v_BGSD, visible)
    with torch.autocast("cpu", enabled=False):
        return path(q_BHTD.float(), k_BGSD.float(), v_BGSD.float(), visible)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _open(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    return _sdpa(q, k, v)


def _causal(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    return _sdpa(q, k, v, causal=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    return _sdpa(q, k, v, mask=visible.mask)


def _spans(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, visible: Visibility) -> Tensor:
    B, H, T, D = q_BHTD.shape
    assert visible.spans is not None
    # One split and one cat over the flattened tokens: slicing row by row would make the backward
    # pass allocate a full-size gradient for every slice.
    pieces = zip(*(_flat_split(x, visible.spans) for x in (q_BHTD, k_BGTD, v_BGTD)), strict=True)
    out_1HND = torch.cat([_sdpa(q, k, v, causal=True) for q, k, v in pieces], dim=2)
    return out_1HND.reshape(H, B, T, D).transpose(0, 1)


def _flat_split(x_BHTD: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    flat = x_BHTD.transpose(0, 1).flatten(1, 2)
    return flat[None].split(lengths, dim=2)


def attend_reference(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BTS: Tensor) -> Tensor:
    """The definition, step by step: scores, mask, softmax, weighted sum (Vaswani et al. 2017)."""
    repeat = q_BHTD.shape[1] // k_BGSD.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k_BGSD, v_BGSD))
    scores = q_BHTD @ k.transpose(-1, -2) / math.sqrt(q_BHTD.shape[-1])
    scores = scores.masked_fill(~mask_BTS[:, None], -torch.inf)
    return scores.softmax(-1) @ v


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor, Visibility], Tensor]] = {
    "open": _open,
    "causal": _causal,
    "spans": _spans,
    "dense": _dense,
}
