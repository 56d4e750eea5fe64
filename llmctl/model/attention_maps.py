"""Attention scores and weights by the definition, for a reader; no path that computes with them is here.

Shape legend: H query heads, G key heads, T queries, W the last of them (the window), S keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.kernels.attention import Scores
from llmctl.model.traced import Attention

WINDOW = 64  # tokens of a map at most: the last ones
CLOSE = 0.02  # weights · values that are farther than this share from what the mixer gave are not its own

OTHER_OUTPUT = "this mixer does more with its weights than a sum of values"
OTHER_SCORES = "queries and keys by themselves do not give what this mixer gave"


def attention_in(
    module: str, notes: dict[str, Tensor], settings: Scores, bias_BHTS: Tensor | None, given_BTF: Tensor
) -> Attention | str:
    """The attention of one mixer from what it noted; in words, why not, if that does not give its output.

    Args:
        notes: `queries` [1, H, T, D], `keys` [1, G, S, D], `values` [1, G, S, D'], and `visible` [1, T, S] or
            [1, 1 or H, T, S], False where a key is hidden, if any is.
        settings: what is done to the scores besides masking.
        bias_BHTS: added to the scores for the distance of query and key.
        given_BTF: what the mixer gave to its output projection, [1, T, H·D'].
    """
    q, k, v = (notes[name][0].float() for name in ("queries", "keys", "values"))
    H, T, S = q.shape[0], q.shape[1], k.shape[1]
    seen = min(WINDOW, T)
    scale = q.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    allowed = torch.ones(1, T, S, dtype=torch.bool, device=q.device)
    if "visible" in notes:
        allowed = notes["visible"][0].expand(-1 if notes["visible"].dim() == 4 else 1, T, S)
    scores, weights = maps(
        q[:, -seen:],
        k,
        allowed[:, -seen:],
        scale,
        cap=settings.softcap,
        bias_HWS=None if bias_BHTS is None else bias_BHTS[0, :, -seen:].float(),
    )
    out = weights @ _per_head(v, H)
    given = given_BTF[0, -seen:].float()
    if given.shape[-1] != H * out.shape[-1]:
        return OTHER_OUTPUT
    given = given.unflatten(-1, (H, -1)).transpose(0, 1)
    deviation = float((out - given).abs().max() / given.abs().max().clamp(min=1e-12))
    if not deviation < CLOSE:
        return OTHER_SCORES
    first = max(0, S - WINDOW)
    return Attention(
        module=module,
        heads=H,
        kv_heads=k.shape[0],
        scale=scale,
        scores=scores[..., first:].cpu(),
        allowed=allowed[:, -seen:, first:].cpu(),
        weights=weights[..., first:].cpu(),
        earlier=weights[..., :first].sum(-1).cpu(),
        hidden=int((~allowed).sum()),
        pairs=allowed.numel(),
        deviation=deviation,
    )


def maps(
    q_HWD: Tensor,
    k_GSD: Tensor,
    allowed_HWS: Tensor,
    scale: float,
    cap: float | None = None,
    bias_HWS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores before the mask, and weights after mask and softmax, [H, W, S] each (Vaswani et al. 2017).

    `cap` bends the scores to lie between -cap and cap (Gemma 2, arXiv:2408.00118).
    """
    scores = q_HWD @ _per_head(k_GSD, q_HWD.shape[0]).transpose(-1, -2) * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if bias_HWS is not None:
        scores = scores + bias_HWS
    return scores, scores.masked_fill(~allowed_HWS, -torch.inf).softmax(-1)


def _per_head(x_GSD: Tensor, heads: int) -> Tensor:
    """A row of every key or value head for each query head that reads it."""
    return x_GSD.repeat_interleave(heads // x_GSD.shape[0], dim=0)
