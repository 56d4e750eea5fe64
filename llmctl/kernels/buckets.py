"""Attention within buckets: a token sees tokens of its own bucket, in time that grows as T, not T².

It serves routing (Roy et al. 2021, arXiv:2003.05997: buckets are clusters) and LSH (Kitaev et al. 2020,
arXiv:2001.04451: buckets are hashes, several rounds of them).

Shape legend: B rows, H query heads, G key/value heads, T queries, S keys (the queries are the last T of them),
D head width, R rounds, C members of a chunk, N tiles of Q tokens in sorted order, K keys that a tile reads.

A document's members of a bucket are counted in order, and C of them make a chunk. A query sees the keys of its own chunk
and of the one before (without causality also of the one after), so that a crowded bucket costs no more than others.
A token's count depends on earlier tokens only, so later ones cannot change what it saw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # tokens of a tile at least
SELF = -3e4  # added to a token's score for itself, where it should see others first; float16 can hold it
OUTSIDE = -8  # the code of a place without a token: no real code is near it


@dataclass(frozen=True)
class Buckets:
    """Which bucket each token is in, and what follows from it for what it sees.

    Attributes:
        index: [B, H, S] or, in several rounds, [B, H, R, S], integers from 0. A pair is seen if any round shows it.
        segment: [B, S], the document of each token, from 0; None is one document a row. Within it tokens are in order.
        chunk: members of a chunk, C.
        causal: whether later tokens are hidden.
        others_first: a token attends to itself only if it sees nothing else (Reformer, where q = k).
    """

    index: Tensor
    segment: Tensor | None
    chunk: int
    causal: bool
    others_first: bool = False

    @cached_property
    def order(self) -> Tensor:
        """[B, H, R, S]: the tokens by document and bucket, each bucket in its own order."""
        return self._keys.argsort(dim=-1, stable=True)

    @cached_property
    def code(self) -> Tensor:
        """[B, H, R, S] int32: the same for tokens of a chunk, one more in the next, two and more elsewhere."""
        keys = self._keys.gather(-1, self.order)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[..., 1:] = keys[..., 1:] != keys[..., :-1]
        place = torch.arange(keys.shape[-1], device=keys.device).expand_as(keys)
        rank = place - place.masked_fill(~first, 0).cummax(-1).values
        sorted_code = (first.int() + (rank % self.chunk == 0).int()).cumsum(-1)
        return torch.empty_like(sorted_code).scatter_(-1, self.order, sorted_code).int()

    @property
    def _keys(self) -> Tensor:
        index = self.index if self.index.dim() == 4 else self.index[:, :, None]
        if self.segment is None:
            return index
        return self.segment[:, None, None] * (index.amax() + 1) + index

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query of one code sees a key of another, order aside; arguments broadcast."""
        seen = (query == key) | (query - 1 == key)
        return seen if self.causal else seen | (query + 1 == key)

    def mask(self, queries: int) -> Tensor:
        """The definition: [B, H, T, S], True where one of the last `queries` tokens sees a token."""
        code, length = self.code, self.code.shape[-1]
        seen = self.near(code[..., -queries:, None], code[..., None, :]).any(2)
        return seen.tril(length - queries) if self.causal else seen


def attend_buckets(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, buckets: Buckets, scale: float | None = None
) -> Tensor:
    """Attention output [B, H, T, D], equal to `attend_buckets_reference`; every token must be a query.

    Tokens are sorted by bucket; tiles of them then read the few tiles where what they see must lie. Several rounds are
    combined into one softmax over all pairs that any round shows: a pair that n rounds show counts 1/n in each
    (Reformer, eq. 5 and 6). Scores are multiplied by `scale`, 1 / sqrt(D) when None. As in `attention.attend`, a CPU
    computes in float32, under autocast too, and other devices in the dtype of the queries.
    """
    scale = scale if scale is not None else 1 / math.sqrt(q_BHTD.shape[-1])
    rounds = [_Round(buckets, number, k_BGTD.shape[1]) for number in range(buckets.code.shape[2])]
    with torch.autocast(q_BHTD.device.type, enabled=False):
        operands = _of_one_dtype(q_BHTD, k_BGTD, v_BGTD)
        if len(rounds) == 1:
            return _one_round(*operands, rounds[0], scale)
        outs, weights = zip(*(_of_several(*operands, one, scale) for one in rounds), strict=True)
        share_RBHT = torch.stack(weights).softmax(0)
        return (torch.stack(outs) * share_RBHT[..., None].to(outs[0].dtype)).sum(0)


def _of_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _one_round(q: Tensor, k: Tensor, v: Tensor, one: _Round, scale: float) -> Tensor:
    mask = one.seen
    if one.buckets.others_first:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        mask = bias.masked_fill_(one.itself, SELF)
    tiles = one.queries(q), one.keys(k), one.keys(v)
    return one.back(F.scaled_dot_product_attention(*tiles, attn_mask=mask, scale=scale))


def _of_several(q: Tensor, k: Tensor, v: Tensor, one: _Round, scale: float) -> tuple[Tensor, Tensor]:
    """The round's output [B, H, T, D], and the logarithm [B, H, T] of the weight it is due among the rounds.

    The scores are one buffer that ends as the exponentials: several of them are what the time would go into.
    """
    scores = (one.queries(q) * scale) @ one.keys(k).transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).add_(one.bias(scores.dtype))
    most = scores.detach().amax(-1, keepdim=True)
    powers = scores.sub_(most).exp_()
    total = powers.sum(-1, keepdim=True)
    out = (powers.to(v.dtype) @ one.keys(v)) / total.to(v.dtype)
    return one.back(out), one.back(most + total.log()).squeeze(-1)


class _Round:
    """Tokens sorted by the buckets of one round and cut into tiles, and the way back.

    A tile needs keys up to 2 C - 1 places before its first token, so it reads as many whole tiles as that takes.
    """

    def __init__(self, buckets: Buckets, number: int, groups: int) -> None:
        self.buckets, self.groups = buckets, groups
        order = buckets.order[:, :, number]
        self.rows, self.heads, self.length = order.shape
        self.order = order.flatten(0, 1)  # [B · H, T]
        self.tile = max(TILE, buckets.chunk)
        self.fill = -self.length % self.tile
        self.before = -(-(2 * buckets.chunk - 1) // self.tile)
        self.after = 0 if buckets.causal else self.before
        code = self._sorted(buckets.code[:, :, number].flatten(0, 1))
        self.seen = buckets.near(code, self._key_places(code))
        here, there = self._places()
        self.itself = here == there
        if buckets.causal:  # within a bucket sorting keeps the order
            self.seen = self.seen & (there <= here)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[B · H, N, Q, K], added to scores: -log of the number of rounds that show the pair, -inf for none."""
        shown = torch.zeros_like(self.seen, dtype=torch.int16)
        codes = self.buckets.code.unbind(2)
        for code in codes:
            tiles = self._sorted(code.flatten(0, 1))
            shown += self.buckets.near(tiles, self._key_places(tiles))
        bias = torch.zeros_like(self.seen, dtype=torch.promote_types(dtype, torch.float32))
        for times in range(2, len(codes) + 1):  # a logarithm of every element takes longer
            bias.masked_fill_(shown == times, -math.log(times))
        if self.buckets.others_first:
            bias = bias.add_(self.itself, alpha=SELF)
        return bias.masked_fill_(~self.seen, -torch.inf)

    def queries(self, x_BHTD: Tensor) -> Tensor:
        """[B · H, N, Q, D]."""
        return F.pad(self._by_order(x_BHTD), (0, 0, 0, self.fill)).unflatten(1, (-1, self.tile))

    def keys(self, x_BGTD: Tensor) -> Tensor:
        """[B · H, N, K, D]; zeros outside the row."""
        around = (0, 0, self.before * self.tile, self.fill + self.after * self.tile)
        return self._windows(F.pad(self._by_order(x_BGTD), around))

    def back(self, x: Tensor) -> Tensor:
        """[B · H, N, Q, D] in sorted order -> [B, H, T, D]."""
        flat = x.flatten(1, 2)
        place = torch.empty_like(self.order)
        place.scatter_(1, self.order, torch.arange(self.length, device=place.device).expand_as(place))
        start = torch.arange(len(flat), device=place.device)[:, None] * flat.shape[1]
        found = flat.flatten(0, 1).index_select(0, (place + start).flatten())
        return found.view(self.rows, self.heads, self.length, x.shape[-1])

    def _by_order(self, x_BGTD: Tensor) -> Tensor:
        """[B · H, T, D], sorted; a key head is read by H / G query heads, each in its own order."""
        heads = x_BGTD.shape[1]
        row = torch.arange(self.rows, device=x_BGTD.device)[:, None] * heads
        head = torch.arange(self.heads, device=x_BGTD.device) // (self.heads // heads)
        start = ((row + head) * self.length).view(-1, 1)
        found = x_BGTD.reshape(-1, x_BGTD.shape[-1]).index_select(0, (self.order + start).flatten())
        return found.view(*self.order.shape, -1)

    def _sorted(self, code: Tensor) -> Tensor:
        """Codes [B · H, T] -> [B · H, N, Q, 1]."""
        filled = F.pad(code.gather(1, self.order), (0, self.fill), value=OUTSIDE)
        return filled.unflatten(1, (-1, self.tile))[..., None]

    def _key_places(self, tiles: Tensor) -> Tensor:
        """[B · H, N, Q, 1] -> [B · H, N, 1, K]."""
        around = (0, 0, self.before * self.tile, self.after * self.tile)
        return self._windows(F.pad(tiles.flatten(1, 2), around, value=2 * OUTSIDE)).transpose(2, 3)

    def _windows(self, x: Tensor) -> Tensor:
        """[B · H, (before + N + after) · Q, D] -> [B · H, N, (before + 1 + after) · Q, D]."""
        count = x.shape[1] // self.tile - self.before - self.after
        tiles = x.unflatten(1, (-1, self.tile))
        return torch.cat([tiles[:, n : n + count] for n in range(self.before + 1 + self.after)], dim=2)

    def _places(self) -> tuple[Tensor, Tensor]:
        """[Q, 1] and [1, K]: places in sorted order, counted from the tile's first token."""
        here = torch.arange(self.tile, device=self.order.device)[:, None]
        size = (self.before + 1 + self.after) * self.tile
        return here, torch.arange(size, device=here.device)[None] - self.before * self.tile


def attend_buckets_reference(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, buckets: Buckets, scale: float | None = None
) -> Tensor:
    """The definition: softmax over all pairs that some round shows; what decodes, where T < S. Dtypes as above."""
    scale = scale if scale is not None else 1 / math.sqrt(q_BHTD.shape[-1])
    queries, keys, repeat = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1] // k_BGSD.shape[1]
    with torch.autocast(q_BHTD.device.type, enabled=False):
        q, k, v = _of_one_dtype(q_BHTD, k_BGSD, v_BGSD)
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scale).to(torch.promote_types(q.dtype, torch.float32))
        if buckets.others_first:
            itself = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
            scores = scores + SELF * itself.triu(keys - queries).tril(keys - queries)
        weights = scores.masked_fill(~buckets.mask(queries), -torch.inf).softmax(-1)
        return weights.to(v.dtype) @ v
