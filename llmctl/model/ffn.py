"""Feed-forward layers: each token by itself, [B, T, E] -> [B, T, E]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.joined import Joinable
from llmctl.recipe.model import ModelSection

Activation = Callable[[Tensor], Tensor]


class Gated(Joinable):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    projections = ("gate_proj", "up_proj")

    def __init__(self, model: ModelSection, inner: int, activation: Activation) -> None:
        super().__init__()
        width, bias = model.hidden_size, model.mlp_bias
        self.activation = activation
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activated(*self.projected(x)))

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What `down_proj` reads, from what the projections give."""
        return self.activation(gate) * up


class Plain(nn.Module):
    """down(act(up(x))) (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, model: ModelSection, inner: int, activation: Activation) -> None:
        super().__init__()
        width, bias = model.hidden_size, model.mlp_bias
        self.activation = activation
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activated(*self.projected(x)))

    def projected(self, x: Tensor) -> tuple[Tensor]:
        """As `Gated.projected`: what is linear in `x`."""
        return (self.up_proj(x),)

    def activated(self, up: Tensor) -> Tensor:
        """As `Gated.activated`."""
        return self.activation(up)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 and Gemma have it (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


# (model, inner width) -> the layer
FFNS: dict[str, Callable[[ModelSection, int], nn.Module]] = {
    "swiglu": partial(Gated, activation=F.silu),
    "geglu": partial(Gated, activation=gelu_tanh),
    "gelu": partial(Plain, activation=F.gelu),
    "gelu_tanh": partial(Plain, activation=gelu_tanh),
    "relu": partial(Plain, activation=F.relu),
    "relu2": partial(Plain, activation=relu2),
}
