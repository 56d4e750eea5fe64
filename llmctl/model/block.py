"""One layer of a stack: mix the tokens, then work on each, both added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from llmctl.model.attention import ATTENTIONS
from llmctl.model.context import Context
from llmctl.model.ffn import FFNS
from llmctl.model.norms import NORMS
from llmctl.model.state import KeyValueState
from llmctl.recipe.model import ModelSection


class Block(nn.Module):
    """Pre-norm block: x + mixer(norm(x)), then x + ffn(norm(x)). Names are Llama's."""

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        norm = NORMS[model.norm]
        self.self_attn = ATTENTIONS[model.attention](model, layer)
        self.mlp = FFNS[model.ffn](model)
        self.input_layernorm = norm(model.hidden_size, model.rms_norm_eps)
        self.post_attention_layernorm = norm(model.hidden_size, model.rms_norm_eps)

    def forward(self, x_BTE: Tensor, ctx: Context, state: KeyValueState | None = None) -> Tensor:
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), ctx, state)
        return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
