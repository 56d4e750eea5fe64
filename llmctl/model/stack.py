"""A stack of blocks in plain torch: embedded tokens in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmctl.model.block import Block
from llmctl.model.context import Context
from llmctl.model.norms import NORMS
from llmctl.model.positions import POSITIONS
from llmctl.model.state import KeyValueState
from llmctl.recipe.model import ModelSection

Run = Callable[..., Tensor]


class Stack:
    """Embedding table, blocks and final norm.

    Mixed into the Hugging Face backbone instead of held by it, so that parameters keep the names
    every Llama tool knows (`model.layers.0.…`, not `model.stack.layers.0.…`).
    """

    spec: ModelSection
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module

    def build(self, spec: ModelSection) -> None:
        """Make the modules. `spec` must be resolved: every size filled in."""
        assert spec.vocab_size is not None
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_hidden_layers))
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.rms_norm_eps)

    def run(
        self,
        x_BTE: Tensor,
        ctx: Context,
        states: Sequence[KeyValueState] | None = None,
        call: Run | None = None,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, E] after the final norm.

        Args:
            states: one a layer, from `init_states`; None when nothing is remembered.
            call: how to run a block, such as an activation-checkpointing function; None calls it.
            keep: if given, the input of every block and the final states are appended to it.
        """
        self.prepare(ctx)
        for index, layer in enumerate(self.layers):
            state = states[index] if states is not None else None
            if keep is not None:
                keep.append(x_BTE)
            x_BTE = call(layer, x_BTE, ctx, state) if call is not None else layer(x_BTE, ctx, state)
        x_BTE = self.norm(x_BTE)
        if keep is not None:
            keep.append(x_BTE)
        return x_BTE

    def prepare(self, ctx: Context) -> None:
        """Put into `ctx` what the blocks look up in it; blocks can then be run one by one."""
        ctx.rotary = POSITIONS[self.spec.position](self.spec, ctx.queries.position)
        for layer in self.layers:
            layer.self_attn.prepare(ctx)

    def init_states(self, batch: int, capacity: int) -> list[KeyValueState]:
        """Empty memory for every layer: `capacity` tokens in each of `batch` rows."""
        weight = self.embed_tokens.weight
        # the CPU path attends in float32, so it keeps what it needs
        dtype: torch.dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        return [layer.self_attn.init_state(batch, capacity, dtype, weight.device) for layer in self.layers]
