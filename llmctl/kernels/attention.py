"""Softmax attention over what a query may see, by the fastest path the mask allows.

Shape legend: B rows, H query heads, G key/value heads, T queries, S keys, D head width.

Paths, one function each, all equal to `reference.attend_reference`:

    open      every query sees every key (one-token decoding)
    causal    one document from position 0: the kernel's own causal flag
    spans     packed rows: each document by itself, so nothing is computed across documents
    blocks    local patterns: each block of queries reads the blocks of keys near it (blocks.py)
    dense     any other pattern: a mask [B, 1 or H, T, S], boolean or added to the scores

Scores that are bent by a soft cap take none of them: the definition is computed (`attend_capped`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.kernels.blocks import BlockLayout, attend_blocks


@dataclass(frozen=True)
class Visibility:
    """What the queries of one forward pass may see, in the cheapest form that says it.

    Attributes:
        path: a key of `PATHS`.
        mask: [B or 1, 1 or H, T, S]: boolean, True where a query sees a key, or float, what is added to a
            score, -inf where it does not; `dense` only.
        spans: token counts of the documents over the flattened rows, summing to B * T; `spans` only.
        causal: whether a query of a span sees only what stands before it; `spans` only.
        layout: which blocks of keys each block of queries reads; `blocks` only.
    """

    path: str
    mask: Tensor | None = None
    spans: tuple[int, ...] | None = None
    causal: bool = True
    layout: BlockLayout | None = None


@dataclass(frozen=True)
class Scores:
    """What is done to the scores besides masking.

    Attributes:
        scale: their factor; 1 / sqrt(D) when None.
        softcap: cap · tanh(score / cap), so that none exceeds it (Gemma 2, arXiv:2408.00118).
        dropout: share of the weights that is dropped; 0 outside training.
    """

    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0


PLAIN = Scores()


def attend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible: Visibility, scores: Scores = PLAIN
) -> Tensor:
    """Attention output [B, H, T, D]: float32 on CPU, else in the dtype of the queries.

    H must be a multiple of G; query head h reads key head h // (H / G) (Ainslie et al. 2023,
    arXiv:2305.13245). Values may be of another width than keys.

    On CPU the work is done in float32 even under bf16 autocast: torch's bf16 flash kernel there is
    about half as fast as its float32 one (`benchmarks/attention_cpu.py`), and less precise.
    """
    path = PATHS[visible.path]
    if scores.softcap is not None or (scores.dropout and visible.path == "blocks"):
        path = attend_capped
    if q_BHTD.device.type != "cpu" or q_BHTD.dtype == torch.float64:
        k_BGSD, v_BGSD = k_BGSD.to(q_BHTD.dtype), v_BGSD.to(q_BHTD.dtype)
        return path(q_BHTD, k_BGSD, v_BGSD, visible, scores)
    with torch.autocast("cpu", enabled=False):
        return path(q_BHTD.float(), k_BGSD.float(), v_BGSD.float(), visible, scores)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[1] != k.shape[1],
        dropout_p=scores.dropout,
        scale=scores.scale,
    )


def _open(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scores: Scores) -> Tensor:
    return _sdpa(q, k, v, scores)


def _causal(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scores: Scores) -> Tensor:
    return _sdpa(q, k, v, scores, causal=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scores: Scores) -> Tensor:
    mask = visible.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return _sdpa(q, k, v, scores, mask=mask)


def _spans(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, visible: Visibility, scores: Scores) -> Tensor:
    B, H, T, _ = q_BHTD.shape
    assert visible.spans is not None
    # One split and one cat over the flattened tokens: slicing row by row would make the backward
    # pass allocate a full-size gradient for every slice.
    pieces = zip(*(_flat_split(x, visible.spans) for x in (q_BHTD, k_BGTD, v_BGTD)), strict=True)
    out_1HND = torch.cat([_sdpa(q, k, v, scores, causal=visible.causal) for q, k, v in pieces], dim=2)
    return out_1HND.reshape(H, B, T, -1).transpose(0, 1)


def _blocks(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scores: Scores) -> Tensor:
    assert visible.layout is not None
    return attend_blocks(q, k, v, visible.layout, scores.scale)


def _flat_split(x_BHTD: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    flat = x_BHTD.transpose(0, 1).flatten(1, 2)
    return flat[None].split(lengths, dim=2)


def attend_capped(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible: Visibility, scores: Scores
) -> Tensor:
    """The definition with all that `scores` can ask for; memory grows with T x S."""
    repeat = q_BHTD.shape[1] // k_BGSD.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k_BGSD, v_BGSD))
    scale = q_BHTD.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    raw = q_BHTD @ k.transpose(-1, -2) * scale
    if scores.softcap is not None:
        raw = (raw / scores.softcap).tanh() * scores.softcap
    mask = as_mask(visible, q_BHTD.shape, q_BHTD.device)
    if mask is not None:
        raw = raw + mask if mask.is_floating_point() else raw.masked_fill(~mask, -torch.inf)
    return F.dropout(raw.softmax(-1), scores.dropout) @ v


def as_mask(visible: Visibility, shape: torch.Size, device: torch.device) -> Tensor | None:
    """What a visibility of queries [B, H, T, D] says, as a mask of `dense`; None where all is seen."""
    rows, _, length, _ = shape
    if visible.path == "causal":
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if visible.path == "spans":
        assert visible.spans is not None
        counts = torch.tensor(visible.spans, device=device)
        number = torch.repeat_interleave(torch.arange(len(counts), device=device), counts).view(rows, length)
        same = number[:, None, :, None] == number[:, None, None]
        return same.tril() if visible.causal else same
    if visible.path == "blocks":
        assert visible.layout is not None
        return visible.layout.dense(length)[:, None]
    return visible.mask


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor, Visibility, Scores], Tensor]] = {
    "open": _open,
    "causal": _causal,
    "spans": _spans,
    "blocks": _blocks,
    "dense": _dense,
}
