"""Initial weights, by the role a parameter plays.

GPT-2's scheme (Radford et al. 2019): normal weights, and matrices that write into the residual
stream scaled down by the square root of how many do, so that its size does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmctl.recipe.model import ModelSection

# parameter name's end -> role; the first match wins
ROLES: tuple[tuple[str, str], ...] = (
    ("norm.weight", "one"),
    ("norm.shift", "zero"),
    (".A_log", "rates"),
    (".dt_bias", "steps"),
    (".D", "one"),
    ("conv1d.weight", "short"),
    ("correction_bias", "zero"),
    (".bias", "zero"),
    ("o_proj.weight", "residual"),
    ("out_proj.weight", "residual"),
    ("down_proj.weight", "residual"),
    (".weight", "normal"),
    (".centroids", "normal"),
)


def role_of(name: str) -> str:
    """one, zero, residual, normal, or a role of its own. Raises KeyError for a parameter the table forgot."""
    for end, role in ROLES:
        if name.endswith(end):
            return role
    raise KeyError(f"no initialisation for parameter {name}")


@torch.no_grad()
def initialize(model: nn.Module, spec: ModelSection, seed: int) -> None:
    """Fill every parameter and saved buffer in place, from one generator in order of name: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, weight in sorted((dict(model.named_parameters()) | buffers).items()):
        fill(weight, role_of(name), spec, generator)


def fill(weight: Tensor, role: str, spec: ModelSection, generator: torch.Generator | None = None) -> None:
    """Fill one tensor according to its role."""
    values = torch.empty(weight.shape, dtype=torch.float32)
    weight.copy_(FILLS[role](values, spec, generator))


def _normal(values: Tensor, spec: ModelSection, generator: torch.Generator | None) -> Tensor:
    return values.normal_(0.0, spec.initializer_range, generator=generator)


def _residual(values: Tensor, spec: ModelSection, generator: torch.Generator | None) -> Tensor:
    deviation = spec.initializer_range / math.sqrt(2 * spec.num_hidden_layers)
    return values.normal_(0.0, deviation, generator=generator)


def _rates(values: Tensor, spec: ModelSection, generator: torch.Generator | None) -> Tensor:
    """Heads forget at rates 1, 2, 3 …, as in Mamba-2's own code."""
    return torch.arange(1, len(values) + 1, dtype=torch.float32).log()


def _steps(values: Tensor, spec: ModelSection, generator: torch.Generator | None) -> Tensor:
    """Biases whose softplus is spread evenly, in the logarithm, between the smallest and largest time step."""
    assert spec.ssm is not None
    low, high = math.log(spec.ssm.time_step_min), math.log(spec.ssm.time_step_max)
    steps = (values.uniform_(generator=generator) * (high - low) + low).exp()
    steps = steps.clamp(min=spec.ssm.time_step_floor)
    return steps + torch.log(-torch.expm1(-steps))


def _short(values: Tensor, spec: ModelSection, generator: torch.Generator | None) -> Tensor:
    bound = values.shape[-1] ** -0.5
    return values.uniform_(-bound, bound, generator=generator)


# role -> (empty float32 tensor, spec, generator) -> its values
FILLS: dict[str, Callable[[Tensor, ModelSection, torch.Generator | None], Tensor]] = {
    "one": lambda values, spec, generator: values.fill_(1.0),
    "zero": lambda values, spec, generator: values.zero_(),
    "normal": _normal,
    "residual": _residual,
    "rates": _rates,
    "steps": _steps,
    "short": _short,
}
