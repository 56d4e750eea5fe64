"""One layer of a stack: mix the tokens, then work on each, both added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.attention import CrossAttention
from llmctl.model.context import Context
from llmctl.model.experts import EXPERTS, Routing
from llmctl.model.ffn import FFNS
from llmctl.model.mixers import mixer_of
from llmctl.model.norms import NORMS
from llmctl.model.state import State, TokenState
from llmctl.recipe.model import ModelSection

Sublayer = Callable[[Tensor], Tensor]


class PairState:
    """Memory of a block that mixes twice: its own tokens, and the encoder's."""

    def __init__(self, own: State, cross: TokenState) -> None:
        self.own, self.cross = own, cross

    @property
    def length(self) -> int:
        return self.own.length

    @property
    def rows(self) -> int:
        return self.own.rows

    def reserve(self, length: int, most: int) -> None:
        """As `State.reserve`."""
        self.own.reserve(length, most)

    def cut(self, length: int) -> int:
        """As `State.cut`; the encoder's side stays."""
        return self.own.cut(length)

    def reorder(self, rows: Tensor) -> None:
        """As `State.reorder`."""
        self.own.reorder(rows)
        self.cross.reorder(rows)


class Block(nn.Module):
    """Mixer, in a decoder of an encoder–decoder cross-attention, and feed-forward. Names are Llama's.

    Each sublayer f is added to the stream x, with its norms where `norm_placement` says:

        pre        x + f(norm(x))            (Xiong et al. 2020, arXiv:2002.04745)
        post       norm(x + f(x))            (Vaswani et al. 2017)
        sandwich   x + norm'(f(norm(x)))     (Ding et al. 2021, arXiv:2105.13290)
    """

    def __init__(self, model: ModelSection, layer: int, cross: bool = False) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return NORMS[model.norm](model.hidden_size, model.norm_eps)

        sandwich = model.norm_placement == "sandwich"
        self.layer = layer
        self.placement, self.dropout = PLACEMENTS[model.norm_placement], model.hidden_dropout
        self.self_attn = mixer_of(model, layer)
        self.input_layernorm = norm()
        self.mixer_output_layernorm = norm() if sandwich else None
        self.cross_attn = CrossAttention(model, layer) if cross else None
        self.cross_layernorm = norm() if cross else None
        self.mlp: nn.Module | None = None
        self.routes = model.has_experts(layer)
        if self.routes and model.experts is not None:
            self.mlp = EXPERTS[model.experts.kind](model)
        elif model.ffn != "none":
            assert model.intermediate_size is not None
            self.mlp = FFNS[model.ffn](model, model.intermediate_size)
        self.post_attention_layernorm = norm() if self.mlp is not None else None
        self.mlp_output_layernorm = norm() if sandwich and self.mlp is not None else None

    def forward(
        self, x_BTE: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The stream after this layer, and what its router decided if it has one."""
        own, cross = (state.own, state.cross) if isinstance(state, PairState) else (state, None)
        x_BTE = self.placement(
            x_BTE,
            lambda x: self._dropped(self.self_attn(x, ctx, own)),
            self.input_layernorm,
            self.mixer_output_layernorm,
        )
        if self.cross_attn is not None:
            attend = self.cross_attn
            x_BTE = self.placement(
                x_BTE, lambda x: self._dropped(attend(x, ctx, cross)), self.cross_layernorm, None
            )
        if self.mlp is None:
            return x_BTE, None
        found: list[Routing] = []

        def forward(x: Tensor) -> Tensor:
            assert self.mlp is not None
            if not self.routes:
                return self._dropped(self.mlp(x))
            y, routing = self.mlp(x, ctx)
            if ctx.trace is not None:
                shares = routing.shares if routing.shares is not None else routing.logits.softmax(-1)
                ctx.note(self.layer, "routing", shares)
            found.append(routing)
            return self._dropped(y)

        x_BTE = self.placement(x_BTE, forward, self.post_attention_layernorm, self.mlp_output_layernorm)
        return x_BTE, found[0] if found else None

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> State:
        """Empty memory of this layer for `capacity` tokens in each of `batch` rows."""
        own: State = self.self_attn.init_state(batch, capacity, dtype, device)
        if self.cross_attn is None:
            return own
        return PairState(own, self.cross_attn.init_state(batch, dtype, device))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


def _pre(x: Tensor, sublayer: Sublayer, norm: Sublayer, after: Sublayer | None) -> Tensor:
    return x + sublayer(norm(x))


def _post(x: Tensor, sublayer: Sublayer, norm: Sublayer, after: Sublayer | None) -> Tensor:
    return norm(x + sublayer(x))


def _sandwich(x: Tensor, sublayer: Sublayer, norm: Sublayer, after: Sublayer | None) -> Tensor:
    return x + sublayer(norm(x)) if after is None else x + after(sublayer(norm(x)))


PLACEMENTS: dict[str, Callable[[Tensor, Sublayer, Sublayer, Sublayer | None], Tensor]] = {
    "pre": _pre,
    "post": _post,
    "sandwich": _sandwich,
}
