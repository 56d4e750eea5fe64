"""Initial weights, by the role a parameter plays.

GPT-2's scheme (Radford et al. 2019): normal weights, and matrices that write into the residual
stream scaled down by the square root of how many do, so that its size does not grow with depth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmctl.recipe.model import ModelSection

# parameter name's end -> role; the first match wins
ROLES: tuple[tuple[str, str], ...] = (
    ("norm.weight", "one"),
    (".bias", "zero"),
    ("o_proj.weight", "residual"),
    ("down_proj.weight", "residual"),
    (".weight", "normal"),
)


def role_of(name: str) -> str:
    """one, zero, residual or normal. Raises KeyError for a parameter the table forgot."""
    for end, role in ROLES:
        if name.endswith(end):
            return role
    raise KeyError(f"no initialisation for parameter {name}")


@torch.no_grad()
def initialize(model: nn.Module, spec: ModelSection, seed: int) -> None:
    """Fill every parameter in place, from one generator in order of name: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        fill(weight, role_of(name), spec, generator)


def fill(weight: Tensor, role: str, spec: ModelSection, generator: torch.Generator | None = None) -> None:
    """Fill one tensor according to its role."""
    if role == "one":
        weight.fill_(1.0)
    elif role == "zero":
        weight.zero_()
    else:
        residual = math.sqrt(2 * spec.num_hidden_layers) if role == "residual" else 1.0
        values = torch.empty(weight.shape, dtype=torch.float32)
        values.normal_(0.0, spec.initializer_range / residual, generator=generator)
        weight.copy_(values)
