"""Attention mixers: tokens exchange information, [B, T, E] -> [B, T, E].

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head width, E hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmctl.kernels.attention import attend
from llmctl.kernels.rowwise import rotate
from llmctl.model.context import Context
from llmctl.model.joined import Joinable
from llmctl.model.norms import NORMS
from llmctl.model.patterns import PATTERNS
from llmctl.model.state import DenseState, KeyValueState
from llmctl.recipe.model import ModelSection


class GroupedQueryAttention(Joinable):
    """Queries in H heads, keys and values in G (Ainslie et al. 2023, arXiv:2305.13245).

    G = H is multi-head attention (Vaswani et al. 2017), G = 1 multi-query (Shazeer 2019).
    """

    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        assert model.head_dim is not None and model.num_key_value_heads is not None
        self.head_dim, self.kv_heads = model.head_dim, model.num_key_value_heads
        self.pattern = PATTERNS[model.layer_pattern(layer)](model)
        width = model.hidden_size
        inner, kv_inner = model.num_attention_heads * model.head_dim, self.kv_heads * model.head_dim
        qkv_bias, out_bias = model.attention_bias != "none", model.attention_bias == "all"
        self.q_proj = nn.Linear(width, inner, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_inner, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_inner, bias=qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=out_bias)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if model.qk_norm:
            norm = NORMS[model.norm]
            self.q_norm = norm(model.head_dim, model.rms_norm_eps)
            self.k_norm = norm(model.head_dim, model.rms_norm_eps)

    def forward(self, x_BTE: Tensor, ctx: Context, state: KeyValueState | None) -> Tensor:
        q, k, v = map(self._heads, self.projected(x_BTE))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rotary is not None:
            cos, sin = (table[:, None] for table in ctx.rotary)
            q, k = rotate(q, cos, sin).to(_kept(q)), rotate(k, cos, sin).to(_kept(k))
        if state is not None:
            k, v = state.append(k, v)
        out_BHTD = attend(q, k, v, ctx.visible(self.pattern))
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2).to(x_BTE.dtype))

    def prepare(self, ctx: Context) -> None:
        """Work out what this layer's queries may see before any block runs, so that blocks only look it up."""
        ctx.visible(self.pattern)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> DenseState:
        """Empty memory for `capacity` tokens in each of `batch` rows."""
        return DenseState((batch, self.kv_heads, capacity, self.head_dim), dtype, device)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _kept(x: Tensor) -> torch.dtype:
    # On CPU attention runs in float32 anyway (kernels/attention.py): casting down between would only lose.
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype


ATTENTIONS: dict[str, Callable[[ModelSection, int], nn.Module]] = {"gqa": GroupedQueryAttention}
