"""Which mixer a layer gets: by its own kind, or the model's attention with the pattern of that kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from llmctl.model.attention import GroupedQueryAttention
from llmctl.model.content import LshAttention, RoutingAttention
from llmctl.model.mamba import Mamba2
from llmctl.model.mla import MultiHeadLatentAttention
from llmctl.recipe.model import ModelSection

ATTENTIONS: dict[str, Callable[[ModelSection, int], nn.Module]] = {
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
}
# kinds of layers that are no pattern
MIXERS: dict[str, Callable[[ModelSection, int], nn.Module]] = {
    "routing": RoutingAttention,
    "lsh": LshAttention,
    "mamba2": Mamba2,
}


def mixer_of(model: ModelSection, layer: int) -> nn.Module:
    """The mixer of one layer: a module (x [B, T, E], ctx, state) -> [B, T, E] with `prepare` and `init_state`."""
    kind = model.layer_pattern(layer)
    make = MIXERS[kind] if kind in MIXERS else ATTENTIONS[model.attention]
    return make(model, layer)
