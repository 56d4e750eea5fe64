"""Feed-forward layers: each token by itself, [B, T, E] -> [B, T, E]."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.joined import Joinable
from llmctl.recipe.model import ModelSection


class SwiGLU(Joinable):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    projections = ("gate_proj", "up_proj")

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        assert model.intermediate_size is not None
        width, inner, bias = model.hidden_size, model.intermediate_size, model.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.projected(x)
        return self.down_proj(F.silu(gate) * up)


FFNS: dict[str, Callable[[ModelSection], nn.Module]] = {"swiglu": SwiGLU}
