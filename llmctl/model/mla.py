"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads from one small vector a token.

Shape legend: B rows, H heads, T tokens, S keys, E hidden width, N and P channels of a query without and with a position,
V channels of a value, R width of the latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.kernels.attention import Scores, Visibility, attend
from llmctl.model.attention import note_attention, prepare_pattern, scores_now, split_heads, turned
from llmctl.model.context import Context
from llmctl.model.joined import Joinable
from llmctl.model.norms import RMSNorm
from llmctl.model.packed import PackedLinear
from llmctl.model.patterns import pattern_of
from llmctl.model.ready import PrepackedLinear
from llmctl.model.rope import yarn_scale
from llmctl.model.state import KeyValueState, TokenState
from llmctl.recipe.model import ModelSection
from llmctl.recipe.rope import RopeYarn

LATENT_EPS = 1e-6  # of the norms inside; DeepSeek's code has it here whatever the model's own is
# their weights never change, so the matrix need be read from them only once
FIXED = (PrepackedLinear, PackedLinear)


class MultiHeadLatentAttention(Joinable):
    """A token keeps a latent of R channels, from which each head makes its key and value, and P channels of a key that
    all heads share and that alone know the position.

    Two computations, equal but for rounding. Expanded: keys and values of all heads are made from the latents, then
    attended to. Absorbed: a head's score q · (W c) is (Wᵀ q) · c, so queries move to where the latents are, all heads
    attend to the latents themselves, and only the result is taken back. A pass that goes on from cached tokens takes
    the one with fewer products (`absorbs`); any other pass, and one that is traced, is expanded.
    """

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        mla, width, heads = model.mla, model.hidden_size, model.num_attention_heads
        assert mla is not None
        self.layer, self.heads, self.latent = layer, heads, mla.kv_lora_rank
        self.plain, self.turning, self.value = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.pattern = pattern_of(model, layer)
        self.scores, self.dropout = _scores(model, self.plain + self.turning), model.attention_dropout
        inner = heads * (self.plain + self.turning)
        in_bias, out_bias = model.attention_bias != "none", model.attention_bias == "all"
        self.q_a_layernorm: nn.Module | None = None
        self.q_b_proj: nn.Module | None = None
        if mla.q_lora_rank is None:
            self.projections = ("q_proj", "kv_a_proj_with_mqa")
            self.q_proj = nn.Linear(width, inner, bias=False)
        else:
            self.projections = ("q_a_proj", "kv_a_proj_with_mqa")
            self.q_a_proj = nn.Linear(width, mla.q_lora_rank, bias=in_bias)
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, inner, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent + self.turning, bias=in_bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj: nn.Module = nn.Linear(self.latent, heads * (self.plain + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, width, bias=out_bias)
        self._read: tuple[nn.Module, Tensor] | None = None

    def forward(self, x_BTE: Tensor, ctx: Context, state: KeyValueState | None) -> Tensor:
        assert ctx.rotary is not None
        first, compressed = self.projected(x_BTE)
        if self.q_a_layernorm is not None and self.q_b_proj is not None:
            first = self.q_b_proj(self.q_a_layernorm(first))
        q_BHTN, q_BHTP = split_heads(first, self.plain + self.turning).split((self.plain, self.turning), -1)
        c_BTR, k_BTP = compressed.split((self.latent, self.turning), -1)
        q_BHTP, k_B1TP = turned(q_BHTP, ctx.rotary), turned(k_BTP[:, None], ctx.rotary)
        memory = torch.cat((self.kv_a_layernorm(c_BTR)[:, None].to(k_B1TP.dtype), k_B1TP), -1)
        if state is not None:
            (memory,) = state.append(memory)
        matrix = self._matrix(x_BTE.dtype) if self._absorbs(ctx) else None
        if matrix is None:
            out_BHTV = self._expanded(q_BHTN, q_BHTP, memory, ctx)
        else:
            out_BHTV = self._absorbed(q_BHTN, q_BHTP, memory, ctx, matrix)
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2).to(x_BTE.dtype))

    def prepare(self, ctx: Context) -> None:
        """Work out what this layer's queries may see before any block runs."""
        prepare_pattern(ctx, self.layer, self.pattern)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenState:
        """Empty memory for `capacity` tokens in each of `batch` rows: of each its latent and then its turned key, as one
        vector, so that absorbed attention reads both where they lie."""
        return TokenState(batch, ((1, self.latent + self.turning),), capacity, dtype, device)

    def absorbs(self, new: int, all_tokens: int) -> bool:
        """Whether absorbed attention of `new` queries to `all_tokens` keys takes fewer multiplications than expanded."""
        head = self.latent * (self.plain + self.value)
        memory = self.latent + self.turning
        expanded = all_tokens * head + new * all_tokens * (self.plain + self.turning + self.value)
        return new * head + new * all_tokens * 2 * memory < expanded

    def _absorbs(self, ctx: Context) -> bool:
        # a trace shows the queries and keys of each head, which only the expanded computation has
        if not ctx.cached or ctx.trace is not None:
            return False
        return self.absorbs(ctx.queries.position.shape[1], ctx.keys.position.shape[1])

    def _expanded(self, q_BHTN: Tensor, q_BHTP: Tensor, memory_B1SM: Tensor, ctx: Context) -> Tensor:
        c_BSR, k_B1SP = memory_B1SM[:, 0, :, : self.latent], memory_B1SM[..., self.latent :]
        made = split_heads(self.kv_b_proj(c_BSR.to(q_BHTN.dtype)), self.plain + self.value)
        k_BHSN, v = made.split((self.plain, self.value), -1)
        q = torch.cat((q_BHTN.to(q_BHTP.dtype), q_BHTP), -1)
        k = torch.cat((k_BHSN.to(q.dtype), k_B1SP.to(q.dtype).expand(-1, self.heads, -1, -1)), -1)
        note_attention(ctx, self.layer, q, k, v)
        # torch's kernels that do not hold all scores want one width; zeros cost less than the one that does
        width = max(q.shape[-1], self.value)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        scores = scores_now(self, self.scores, self.dropout)
        return attend(q, k, v, ctx.visible(self.pattern), scores)[..., : self.value]

    def _absorbed(
        self, q_BHTN: Tensor, q_BHTP: Tensor, memory_B1SM: Tensor, ctx: Context, matrix: Tensor
    ) -> Tensor:
        up_HNR, down_HVR = matrix.unflatten(0, (self.heads, -1)).split((self.plain, self.value), 1)
        q_BHTR = q_BHTN.to(matrix.dtype) @ up_HNR
        q = torch.cat((q_BHTR.to(q_BHTP.dtype), q_BHTP), -1)
        # The heads read the same memory, so they are so many queries of one head. Its last channels are no values,
        # but leaving them out would cost a copy of the rest.
        seen = _of_each_head(ctx.visible(self.pattern), self.heads)
        scores = scores_now(self, self.scores, self.dropout)
        found = attend(q.flatten(1, 2)[:, None], memory_B1SM, memory_B1SM, seen, scores)
        out_BHTR = found[:, 0, :, : self.latent].unflatten(1, (self.heads, -1))
        return out_BHTR.to(matrix.dtype) @ down_HVR.transpose(1, 2)

    def _matrix(self, dtype: torch.dtype) -> Tensor | None:
        """[H (N + V), R]: what `kv_b_proj` multiplies by; None where that may change unseen, as under an adapter."""
        layer = self.kv_b_proj
        if type(layer) is nn.Linear:
            return layer.weight
        if not isinstance(layer, FIXED):
            return None
        if self._read is None or self._read[0] is not layer or self._read[1].dtype != dtype:
            one = torch.eye(self.latent, dtype=dtype, device=self.kv_a_layernorm.weight.device)
            self._read = (layer, layer(one).t().contiguous())
        return self._read[1]


def _scores(model: ModelSection, width: int) -> Scores:
    """width^-1/2, and warmer with YaRN if it says so for all channels, as in DeepSeek-V2's code."""
    scale = (model.query_pre_attn_scalar or width) ** -0.5
    rope = model.rope_parameters
    if isinstance(rope, RopeYarn) and rope.mscale_all_dim:
        scale *= yarn_scale(rope.factor, rope.mscale_all_dim) ** 2
    return Scores(scale, model.attn_logit_softcapping)


def _of_each_head(seen: Visibility, heads: int) -> Visibility:
    """For queries [B, 1, H T, D] what `seen` says of queries [B, H, T, D] after cached tokens."""
    if seen.mask is None:
        assert seen.path == "open", f"absorbed attention after cached tokens has no path `{seen.path}`"
        return seen
    return Visibility(seen.path, mask=seen.mask.expand(-1, heads, -1, -1).flatten(1, 2)[:, None])
