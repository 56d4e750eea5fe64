"""A stack of blocks in plain torch: token ids in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.block import Block
from llmctl.model.context import Context
from llmctl.model.experts import Routing
from llmctl.model.norms import NORMS
from llmctl.model.positions import POSITIONS, Positions
from llmctl.model.state import State
from llmctl.recipe.model import ModelSection

Run = Callable[..., Any]


@dataclass
class Kept:
    """What a pass is asked to keep besides its result.

    Attributes:
        hidden: the input of every block, then the final states, [B, T, E] each.
        routings: what every layer of experts decided.
    """

    hidden: list[Tensor] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)


class Stack:
    """Embedding tables, blocks and final norm.

    Mixed into the Hugging Face backbone instead of held by it, so that parameters keep the names
    every Llama tool knows (`model.layers.0.…`, not `model.stack.layers.0.…`).
    """

    spec: ModelSection
    embed_tokens: nn.Embedding
    embed_types: nn.Embedding | None
    embed_norm: nn.Module | None
    positions: Positions
    layers: nn.ModuleList
    norm: nn.Module | None

    def build(
        self,
        spec: ModelSection,
        *,
        embeds: bool = True,
        layers: int | None = None,
        cross: bool = False,
    ) -> None:
        """Make the modules. `spec` must be resolved: every size filled in.

        Args:
            embeds: whether it has an embedding table; else it is given embeddings.
            layers: their number; the spec's when None.
            cross: whether the blocks read an encoder's states.
        """
        assert spec.vocab_size is not None
        self.spec = spec
        if embeds:
            self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_types = (
            nn.Embedding(spec.type_vocab_size, spec.hidden_size) if spec.type_vocab_size else None
        )
        self.positions = POSITIONS[spec.position](spec)
        self.embed_norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps) if spec.embedding_norm else None
        self.layers = nn.ModuleList(
            Block(spec, layer, cross) for layer in range(layers or spec.num_hidden_layers)
        )
        # after `post` blocks the stream is normalised already
        last = spec.norm_placement != "post"
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps) if last else None

    def embed(self, tokens: Tensor, ctx: Context, types_BT: Tensor | None = None) -> Tensor:
        """Token ids [B, T], or embeddings [B, T, E] in their place -> the stream before the first block."""
        x_BTE = tokens if tokens.is_floating_point() else self._looked_up(tokens)
        if self.spec.embedding_multiplier != 1.0:
            # rounded to the precision of the stream, as Gemma does
            x_BTE = x_BTE * torch.tensor(
                self.spec.embedding_multiplier, dtype=x_BTE.dtype, device=x_BTE.device
            )
        if self.embed_types is not None:
            types = types_BT if types_BT is not None else torch.zeros_like(ctx.queries.position)
            x_BTE = x_BTE + self.embed_types(types)
        x_BTE = self.positions.embed(x_BTE, ctx.queries.position)
        if self.embed_norm is not None:
            x_BTE = self.embed_norm(x_BTE)
        if self.spec.hidden_dropout and self.layers.training:
            x_BTE = F.dropout(x_BTE, self.spec.hidden_dropout)
        return x_BTE

    def _looked_up(self, tokens: Tensor) -> Tensor:
        """Rows of the table, in the precision of the stream: that of the norms, which are never packed."""
        return self.embed_tokens(tokens).to(next(self.layers[0].input_layernorm.parameters()).dtype)

    def run(
        self,
        x_BTE: Tensor,
        ctx: Context,
        states: Sequence[State] | None = None,
        call: Run | None = None,
        keep: Kept | None = None,
    ) -> Tensor:
        """Hidden states [B, T, E] after the final norm.

        Args:
            x_BTE: from `embed`.
            states: one a layer, from `init_states`; None when nothing is remembered.
            call: how to run a block, such as an activation-checkpointing function; None calls it.
            keep: if given, what it asks for is put there.
        """
        self.prepare(ctx)
        for index, layer in enumerate(self.layers):
            state = states[index] if states is not None else None
            if keep is not None:
                keep.hidden.append(x_BTE)
            x_BTE, routing = call(layer, x_BTE, ctx, state) if call is not None else layer(x_BTE, ctx, state)
            if keep is not None and routing is not None:
                keep.routings.append(routing)
        if self.norm is not None:
            x_BTE = self.norm(x_BTE)
        if keep is not None:
            keep.hidden.append(x_BTE)
        return x_BTE

    def prepare(self, ctx: Context) -> None:
        """Put into `ctx` what the blocks look up in it; blocks can then be run one by one."""
        ctx.rotary = self.positions.rotary(ctx.queries.position)
        ctx.bias = self.positions.bias(ctx)
        for layer in self.layers:
            layer.self_attn.prepare(ctx)

    def init_states(self, batch: int, capacity: int = 0) -> list[State]:
        """Empty memory for every layer: `capacity` tokens in each of `batch` rows before it has to grow."""
        # a norm is never packed
        weight = next(self.layers[0].input_layernorm.parameters())
        # the CPU path attends in float32, so it keeps what it needs
        dtype: torch.dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        return [layer.init_state(batch, capacity, dtype, weight.device) for layer in self.layers]
