"""Attention mixers: tokens exchange information, [B, T, E] -> [B, T, E].

Shape legend: B rows, H query heads, G key/value heads, T tokens, S keys, D head width, E hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmctl.kernels.attention import Scores, attend
from llmctl.kernels.rowwise import rotate
from llmctl.model.context import Context
from llmctl.model.joined import Joinable
from llmctl.model.norms import NORMS
from llmctl.model.patterns import Pattern, pattern_of
from llmctl.model.state import KeyValueState, TokenState
from llmctl.recipe.model import ModelSection


class GroupedQueryAttention(Joinable):
    """Queries in H heads, keys and values in G (Ainslie et al. 2023, arXiv:2305.13245).

    G = H is multi-head attention (Vaswani et al. 2017), G = 1 multi-query (Shazeer 2019).
    """

    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        assert model.head_dim is not None and model.num_key_value_heads is not None
        self.layer, self.head_dim, self.kv_heads = layer, model.head_dim, model.num_key_value_heads
        self.pattern = pattern_of(model, layer)
        self.scores, self.dropout = score_settings(model), model.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = grouped_projections(model)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if model.qk_norm:
            norm = NORMS[model.norm]
            self.q_norm = norm(model.head_dim, model.norm_eps)
            self.k_norm = norm(model.head_dim, model.norm_eps)

    def forward(self, x_BTE: Tensor, ctx: Context, state: KeyValueState | None) -> Tensor:
        q, k, v = (split_heads(x, self.head_dim) for x in self.projected(x_BTE))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rotary is not None:
            q, k = turned(q, ctx.rotary), turned(k, ctx.rotary)
        if state is not None:
            k, v = state.append(k, v)
        note_attention(ctx, self.layer, q, k, v)
        out_BHTD = attend(q, k, v, ctx.visible(self.pattern), scores_now(self, self.scores, self.dropout))
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2).to(x_BTE.dtype))

    def prepare(self, ctx: Context) -> None:
        """Work out what this layer's queries may see before any block runs, so that blocks only look it up."""
        prepare_pattern(ctx, self.layer, self.pattern)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenState:
        """Empty memory for `capacity` tokens in each of `batch` rows."""
        return TokenState(batch, ((self.kv_heads, self.head_dim),) * 2, capacity, dtype, device)


class CrossAttention(nn.Module):
    """Queries of the decoder, keys and values of the encoder's states (Vaswani et al. 2017)."""

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        assert model.head_dim is not None and model.num_key_value_heads is not None
        self.layer, self.head_dim, self.kv_heads = layer, model.head_dim, model.num_key_value_heads
        self.scores, self.dropout = score_settings(model), model.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = grouped_projections(model)

    def forward(self, x_BTE: Tensor, ctx: Context, state: TokenState | None) -> Tensor:
        assert ctx.memory is not None, "cross-attention without a memory"
        q = split_heads(self.q_proj(x_BTE), self.head_dim)
        if state is not None and state.length:
            k, v = (part[:, :, : state.length] for part in state.parts)
        else:
            k, v = (split_heads(p(ctx.memory.hidden), self.head_dim) for p in (self.k_proj, self.v_proj))
            if state is not None:
                k, v = state.append(k, v)
        out_BHTD = attend(q, k, v, ctx.memory.visible, scores_now(self, self.scores, self.dropout))
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2).to(x_BTE.dtype))

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> TokenState:
        """Empty memory; the first pass fills it with the encoder's keys and values."""
        return TokenState(batch, ((self.kv_heads, self.head_dim),) * 2, 0, dtype, device)


def grouped_projections(model: ModelSection) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Queries, keys, values and output of attention with keys and values in groups."""
    assert model.head_dim is not None and model.num_key_value_heads is not None
    width, bias = model.hidden_size, model.attention_bias != "none"
    inner, kv_inner = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return (
        nn.Linear(width, inner, bias=bias),
        nn.Linear(width, kv_inner, bias=bias),
        nn.Linear(width, kv_inner, bias=bias),
        nn.Linear(inner, width, bias=model.attention_bias == "all"),
    )


def prepare_pattern(ctx: Context, layer: int, pattern: Pattern) -> None:
    """Let the context find what a pattern lets queries see, and show it to whoever traces."""
    visible = ctx.visible(pattern)
    if ctx.trace is not None:
        ctx.note(layer, "visible", ctx.mask(pattern))
        if ctx.bias is not None and visible.mask is not None:
            ctx.note(layer, "bias", visible.mask)


def score_settings(model: ModelSection) -> Scores:
    """How a model scales and caps its scores."""
    scalar = model.query_pre_attn_scalar
    return Scores(None if scalar is None else scalar**-0.5, model.attn_logit_softcapping)


def scores_now(module: nn.Module, scores: Scores, dropout: float) -> Scores:
    """The settings of this pass: dropout only while training."""
    if not dropout or not module.training:
        return scores
    return Scores(scores.scale, scores.softcap, dropout)


def split_heads(x_BTI: Tensor, head_dim: int) -> Tensor:
    """[B, T, H·D] -> [B, H, T, D]."""
    return x_BTI.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def turned(x_BHTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Heads turned by their positions, in the precision that attention keeps."""
    cos, sin = rotary
    # On CPU attention runs in float32 anyway (kernels/attention.py): casting down between would only lose.
    wide = x_BHTD.device.type == "cpu" and x_BHTD.dtype != torch.float64
    return rotate(x_BHTD, cos, sin).to(torch.float32 if wide else x_BHTD.dtype)


def note_attention(ctx: Context, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """What a trace shows of an attention layer: queries, keys and values as scores are computed from them."""
    if ctx.trace is not None:
        for name, value in (("queries", q), ("keys", k), ("values", v)):
            ctx.note(layer, name, value)
