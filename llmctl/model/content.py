"""Attention that chooses by content: a token sees tokens of its own bucket, which its vectors decide, not its position.

Buckets come from vectors that are not turned yet: a bucket that depended on the position would undo what rotary
positions promise, that only distances count. Each token's buckets are kept beside its key and value, as numbers, so
decoding sees the very buckets of the pass that made them. They follow from the token alone, so later ones change
nothing.

Shape legend: B rows, H query heads, G key/value heads, T tokens, S keys, D head width, E hidden width, C clusters,
R rounds of hashing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.kernels.buckets import Buckets, attend_buckets, attend_buckets_reference
from llmctl.model.attention import grouped_projections, note_attention, score_settings, split_heads, turned
from llmctl.model.context import Context
from llmctl.model.joined import Joinable
from llmctl.model.norms import NORMS
from llmctl.model.patterns import hashed
from llmctl.model.state import KeyValueState, TokenState
from llmctl.recipe.model import ModelSection


class RoutingAttention(Joinable):
    """A token sees its own k-means cluster (Roy et al. 2020, arXiv:2003.05997): that of the centroid nearest to its query.

    Queries and keys are normalised without parameters. Each head has its own centroids, of which only the direction
    counts. They are no parameters: a step of training moves them by the exponential moving average of the queries they
    were nearest to, in `update_centroids`.
    """

    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        assert model.head_dim is not None and model.num_key_value_heads is not None
        assert model.routing is not None
        self.layer, self.routing = layer, model.routing
        self.heads, self.kv_heads, self.head_dim = (
            model.num_attention_heads,
            model.num_key_value_heads,
            model.head_dim,
        )
        self.scale = score_settings(model).scale
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = grouped_projections(model)
        self.q_norm = NORMS[model.norm](self.head_dim, model.norm_eps) if model.qk_norm else None
        self.k_norm = NORMS[model.norm](self.head_dim, model.norm_eps) if model.qk_norm else None
        self.centroids: Tensor
        clusters = self.routing.num_clusters
        self.register_buffer("centroids", torch.zeros(self.heads, clusters, self.head_dim))
        # made at the first count: a model made on the meta device would be given arbitrary numbers here
        self.register_buffer("gathered", None, persistent=False)

    def forward(self, x_BTE: Tensor, ctx: Context, state: KeyValueState | None) -> Tensor:
        q, k, v = (split_heads(x, self.head_dim) for x in self.projected(x_BTE))
        # frozen queries belong to the base of an adapter, which could not carry centroids that have moved
        counts = self.training and torch.is_grad_enabled() and self.q_proj.weight.requires_grad
        index_BHT = self._nearest(q.detach(), ctx, counts)
        q = _unit(q) if self.q_norm is None else self.q_norm(q)
        k = _unit(k) if self.k_norm is None else self.k_norm(k)
        if ctx.rotary is not None:
            q, k = turned(q, ctx.rotary), turned(k, ctx.rotary)
        kept = index_BHT[..., None]
        if state is not None:
            k, v, kept = state.append(k, v, kept)
        causal = ctx.causality == "causal"
        buckets = Buckets(kept[..., 0].long(), ctx.keys.segment, self.routing.chunk_size, causal)
        out_BHTD = _attend(q, k, v, buckets, self.scale, ctx, self.layer)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2).to(x_BTE.dtype))

    def prepare(self, ctx: Context) -> None:
        """Nothing is known before the tokens are."""

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenState:
        """Empty memory for `capacity` tokens in each of `batch` rows: keys, values, and clusters [B, H, S, 1]."""
        parts = ((self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim), (self.heads, 1))
        return _numbered_state(batch, parts, capacity, dtype, device)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centroids by what was gathered since the last call; one that nothing was near to stays."""
        if self.gathered is None:
            return
        sums_HCD, counts_HC1 = self.gathered[..., :-1], self.gathered[..., -1:]
        mean = sums_HCD / counts_HC1.clamp(min=1)
        moved = torch.lerp(mean, F.normalize(self.centroids.float(), dim=-1), self.routing.decay)
        self.centroids.copy_(torch.where(counts_HC1 > 0, F.normalize(moved, dim=-1), self.centroids))
        self.gathered.zero_()

    @torch.no_grad()
    def _nearest(self, q_BHTD: Tensor, ctx: Context, count: bool) -> Tensor:
        """[B, H, T]: the number of the centroid at the smallest angle. `count` remembers it for the next update."""
        with torch.autocast(q_BHTD.device.type, enabled=False):
            unit_BHTD = F.normalize(_unit(q_BHTD.float()), dim=-1)
            centroids_HCD = F.normalize(self.centroids.float(), dim=-1)
            index_BHT = (unit_BHTD @ centroids_HCD.transpose(1, 2)).argmax(-1)
            if count:
                self._gather(unit_BHTD, index_BHT, ctx.padding())
        return index_BHT

    def _gather(self, unit_BHTD: Tensor, index_BHT: Tensor, padding_BT: Tensor | None) -> None:
        """Add up vectors by cluster, and count them, in [H, C, D + 1]."""
        ones = torch.ones_like(unit_BHTD[..., :1])
        counted = torch.cat((unit_BHTD, ones), -1)
        if padding_BT is not None:
            counted = counted * ~padding_BT[:, None, :, None]
        clusters = self.routing.num_clusters
        head = torch.arange(self.heads, device=index_BHT.device)[:, None]
        place = (head * clusters + index_BHT).flatten()
        found = counted.new_zeros(self.heads * clusters, counted.shape[-1])
        found = found.index_add(0, place, counted.flatten(0, 2)).unflatten(0, (self.heads, clusters))
        # a pass that is computed again for its gradients (activation checkpointing) counts twice; means stay
        self.gathered = found if self.gathered is None else self.gathered + found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As of every module (`to`, `cuda`, `bfloat16` …), but the centroids stay float32, or small moves would be lost."""
        before = self.centroids
        super()._apply(fn, recurse)
        if self.centroids.dtype != torch.float32:
            self.centroids = self.centroids.float() if before.is_meta else before.to(self.centroids.device)
        return self


class LshAttention(Joinable):
    """A token sees tokens of the same hash (Reformer, Kitaev et al. 2020, arXiv:2001.04451).

    A key is its token's query, of length 1, so tokens that see each other are those whose vectors point the same way.
    A round of hashing takes the largest of the products with n/2 random vectors and their opposites; a token sees
    another if any round puts them together, and itself only if it sees nothing else. The random vectors are signs that
    follow from layer, head, round and place alone: nothing has to be saved.
    """

    projections = ("qk_proj", "v_proj")

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        assert model.head_dim is not None and model.num_key_value_heads is not None
        assert model.lsh is not None
        self.layer, self.lsh = layer, model.lsh
        self.heads, self.kv_heads, self.head_dim = (
            model.num_attention_heads,
            model.num_key_value_heads,
            model.head_dim,
        )
        self.scale, width = score_settings(model).scale, model.hidden_size
        inner, bias = self.heads * self.head_dim, model.attention_bias != "none"
        self.qk_proj = nn.Linear(width, inner, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(inner, width, bias=model.attention_bias == "all")
        self.q_norm = NORMS[model.norm](self.head_dim, model.norm_eps) if model.qk_norm else None

    def forward(self, x_BTE: Tensor, ctx: Context, state: KeyValueState | None) -> Tensor:
        q, v = (split_heads(x, self.head_dim) for x in self.projected(x_BTE))
        if self.q_norm is not None:
            q = self.q_norm(q)
        kept_BHTR = self.hashes(q.detach())
        if ctx.rotary is not None:
            q = turned(q, ctx.rotary)
        k = F.normalize(q, dim=-1)
        if state is not None:
            k, v, kept_BHTR = state.append(k, v, kept_BHTR)
        causal = ctx.causality == "causal"
        index_BHRS = kept_BHTR.transpose(2, 3).long()
        buckets = Buckets(index_BHRS, ctx.keys.segment, self.lsh.chunk_size, causal, others_first=True)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        out_BHTD = _attend(q, k, v, buckets, self.scale, ctx, self.layer)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2).to(x_BTE.dtype))

    def prepare(self, ctx: Context) -> None:
        """Nothing is known before the tokens are."""

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenState:
        """Empty memory for `capacity` tokens in each of `batch` rows: keys, values, and hashes [B, H, S, R]."""
        parts = (
            (self.heads, self.head_dim),
            (self.kv_heads, self.head_dim),
            (self.heads, self.lsh.num_hashes),
        )
        return _numbered_state(batch, parts, capacity, dtype, device)

    def hashes(self, q_BHTD: Tensor) -> Tensor:
        """[B, H, T, R]: the bucket of each token in each round (section 2 of the paper)."""
        half = self.lsh.num_buckets // 2
        shape = (self.heads, self.lsh.num_hashes, self.head_dim, half)
        with torch.autocast(q_BHTD.device.type, enabled=False):
            signs_HRDN = _signs(self.layer, shape, q_BHTD.device)
            along = torch.einsum("bhtd,hrdn->bhtrn", q_BHTD.float(), signs_HRDN)
            return torch.cat((along, -along), -1).argmax(-1)


def update_centroids(model: nn.Module) -> None:
    """Move the centroids of every routing layer by what it saw since the last call.

    To be called after each optimizer step. Does nothing for layers that are frozen, as under an adapter, or have seen
    no training since. Each process moves its centroids by the tokens it saw itself.
    """
    for mixer in [module for module in model.modules() if isinstance(module, RoutingAttention)]:
        mixer.update()


@cache
def _signs(layer: int, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Random signs [H, R, D, N], 1.0 or -1.0, the same wherever and whenever they are made."""
    place = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    return (hashed(place, layer) & 1).float() * 2 - 1


def _unit(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis."""
    return F.layer_norm(x, x.shape[-1:])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, scale: float | None, ctx: Context, layer: int
) -> Tensor:
    """Sorted where every token is a query, and by the definition where some are cached."""
    note_attention(ctx, layer, q, k, v)
    if ctx.trace is not None:
        ctx.note(layer, "visible", _shown(buckets, q.shape[2]))
    attend = attend_buckets if q.shape[2] == k.shape[2] else attend_buckets_reference
    # as in kernels/attention.py: float32 on the CPU, and the dtype of the queries elsewhere
    wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.to(wide), k.to(wide), v.to(wide), buckets, scale)


def _shown(buckets: Buckets, queries: int) -> Tensor:
    """What the queries read, [B, H, T, S]; where others come first, a token itself only if it sees none."""
    seen = buckets.mask(queries)
    if not buckets.others_first:
        return seen
    others = seen & ~torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)[-queries:]
    return torch.where(others.any(-1, keepdim=True), others, seen)


def _numbered_state(
    batch: int, parts: Sequence[tuple[int, int]], capacity: int, dtype: torch.dtype, device: torch.device
) -> TokenState:
    """Memory whose last part holds whole numbers, which bfloat16 would round."""
    state = TokenState(batch, parts, capacity, dtype, device)
    state.parts[-1] = state.parts[-1].int()
    return state
