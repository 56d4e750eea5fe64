"""FlashAttention, to be read: softmax attention tile by tile, without ever holding the scores.

Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691), in plain torch: the reference for the kernels of
flash_triton.py, and the definition of what they may be asked for.

Shape legend: B rows, H query heads, G key/value heads, R = H / G, T queries, S keys (the queries are the last T of
them), D width of queries and keys, V width of values, q and k the queries and keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """Which keys a query sees, by place.

    Attributes:
        causal: whether later keys are hidden.
        window: keys `window` places away and more are hidden; None hides none.
        scale: scores are multiplied by it; None is 1 / sqrt(D).
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None

    def factor(self, width: int) -> float:
        """The scale, for queries of this width."""
        return 1 / math.sqrt(width) if self.scale is None else self.scale

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """True where a query's place sees a key's; arguments broadcast."""
        seen = torch.ones_like(query == key)
        if self.causal:
            seen = seen & (key <= query)
        if self.window is not None:
            seen = seen & ((query - key).abs() < self.window)
        return seen

    def reach(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """The places from, to (excluded) of all keys that queries at places first … last may see."""
        start = 0 if self.window is None else max(0, first - self.window + 1)
        end = keys if self.window is None else min(keys, last + self.window)
        return start, min(end, last + 1) if self.causal else end


@dataclass(frozen=True)
class Tiles:
    """How many queries and keys are worked on at a time."""

    queries: int = 64
    keys: int = 64


def flash_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, band: Band, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, T, V] in the dtype of the queries, and log-sum-exp of the scores [B, H, T] in float32.

    Query head h reads key head h // R. Both results have gradients. Sums are in float32 (float64 for such queries).
    """
    out, lse = _Flash.apply(q_BHTD, k_BGSD, v_BGSV, band, tiles or Tiles())
    return out, lse


class _Flash(torch.autograd.Function):
    """Backwards the scores are computed again, and normalised by the log-sum-exp that was kept."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, band: Band, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _grouped(q_BHTD, k_BGSD, v_BGSV)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse = q.new_zeros(q.shape[:-1])
        for rows, columns in _work(q.shape[3], k.shape[2], band, tiles):
            out[:, :, :, rows], lse[..., rows] = _query_tile(q, k, v, band, rows, columns)
        out, lse = out.flatten(1, 2).to(q_BHTD.dtype), lse.flatten(1, 2)
        ctx.save_for_backward(q_BHTD, k_BGSD, v_BGSV, out, lse)
        ctx.band, ctx.tiles = band, tiles
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given_q, given_k, given_v, out, lse = ctx.saved_tensors
        q, k, v = _grouped(given_q, given_k, given_v)
        groups = k.shape[1]
        d_out, out, lse, d_lse = (
            x.to(q.dtype).unflatten(1, (groups, -1)) for x in (grads[0], out, lse, grads[1])
        )
        # dS = P (dP - sum of P dP over the keys), and that sum is dO · O; d lse / dS is P
        delta = (d_out * out).sum(-1) - d_lse
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        factor = ctx.band.factor(q.shape[-1])
        for rows, columns in _work(q.shape[3], k.shape[2], ctx.band, ctx.tiles):
            q_tile, d_out_tile = q[:, :, :, rows], d_out[:, :, :, rows]
            for keys in columns:
                scores = _scores(q, k, ctx.band, rows, keys)
                p = (scores - lse[..., rows, None]).exp()
                dp = torch.einsum("bgrqv,bgkv->bgrqk", d_out_tile, v[:, :, keys])
                ds = p * (dp - delta[..., rows, None]) * factor
                dv[:, :, keys] += torch.einsum("bgrqk,bgrqv->bgkv", p, d_out_tile)
                dk[:, :, keys] += torch.einsum("bgrqk,bgrqd->bgkd", ds, q_tile)
                dq[:, :, :, rows] += torch.einsum("bgrqk,bgkd->bgrqd", ds, k[:, :, keys])
        dq = dq.flatten(1, 2)
        return dq.to(given_q.dtype), dk.to(given_k.dtype), dv.to(given_v.dtype), None, None


def _query_tile(
    q_BGRTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, band: Band, rows: slice, columns: list[slice]
) -> tuple[Tensor, Tensor]:
    """Output [B, G, R, q, V] and log-sum-exp [B, G, R, q] of a tile of queries: one pass over the keys it sees."""
    shape = q_BGRTD[:, :, :, rows].shape[:-1]
    most = q_BGRTD.new_full(shape, -torch.inf)
    total, out = q_BGRTD.new_zeros(shape), q_BGRTD.new_zeros(*shape, v_BGSV.shape[-1])
    for keys in columns:
        scores = _scores(q_BGRTD, k_BGSD, band, rows, keys)
        higher = torch.maximum(most, scores.amax(-1))
        level = higher.masked_fill(higher == -torch.inf, 0)  # a row that has seen nothing yet: no inf - inf
        p = (scores - level[..., None]).exp()
        # what was summed so far is brought to the new level
        faded = (most - level).exp()
        total = faded * total + p.sum(-1)
        out = faded[..., None] * out + torch.einsum("bgrqk,bgkv->bgrqv", p, v_BGSV[:, :, keys])
        most = higher
    return out / total[..., None], most + total.log()


def _scores(q_BGRTD: Tensor, k_BGSD: Tensor, band: Band, rows: slice, keys: slice) -> Tensor:
    """[B, G, R, q, k], -inf where the band hides the key."""
    before = k_BGSD.shape[2] - q_BGRTD.shape[3]
    query = before + torch.arange(rows.start, rows.stop, device=q_BGRTD.device)
    key = torch.arange(keys.start, keys.stop, device=q_BGRTD.device)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q_BGRTD[:, :, :, rows], k_BGSD[:, :, keys])
    seen = band.sees(query[:, None], key[None])
    return (scores * band.factor(q_BGRTD.shape[-1])).masked_fill(~seen, -torch.inf)


def _work(queries: int, keys: int, band: Band, tiles: Tiles) -> Iterator[tuple[slice, list[slice]]]:
    """Each tile of queries, with the tiles of keys that it may see."""
    before = keys - queries
    for first in range(0, queries, tiles.queries):
        stop = min(first + tiles.queries, queries)
        start, end = band.reach(before + first, before + stop - 1, keys)
        columns = [slice(at, min(at + tiles.keys, end)) for at in range(start, end, tiles.keys)]
        yield slice(first, stop), columns


def _grouped(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q as [B, G, R, T, D], and all in float32 or wider."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    q = q_BHTD.unflatten(1, (k_BGSD.shape[1], -1))
    return q.to(wide), k_BGSD.to(wide), v_BGSV.to(wide)
