"""How positions enter the model: here, by turning queries and keys (rotary embedding).

Shape legend: B rows, T tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmctl.recipe.model import ModelSection, RopeDefault, RopeLinear, RopeLlama3


def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    """theta^(-2i/width) for each of the width/2 pairs of channels (Su et al. 2021, arXiv:2104.09864)."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def _default(rope: RopeDefault, width: int, device: torch.device) -> Tensor:
    return _frequencies(rope.rope_theta, width, device)


def _linear(rope: RopeLinear, width: int, device: torch.device) -> Tensor:
    return _frequencies(rope.rope_theta, width, device) / rope.factor


def _llama3(rope: RopeLlama3, width: int, device: torch.device) -> Tensor:
    """Wavelengths beyond the original context are stretched by `factor`, short ones kept, the rest blended."""
    frequencies = _frequencies(rope.rope_theta, width, device)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


ROPE_TYPES: dict[str, Callable[..., Tensor]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
}


def rotary_tables(model: ModelSection, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, D/2], float32, of the angles by which each pair of channels is turned.

    Computed anew each pass: it is a few microseconds, and there is no buffer to lose when a model
    is made on the meta device, sharded or cast.
    """
    rope = model.rope_parameters
    assert model.head_dim is not None
    frequencies = ROPE_TYPES[rope.rope_type](rope, model.head_dim, position_BT.device)
    angles = position_BT[..., None].float() * frequencies
    return angles.cos(), angles.sin()


POSITIONS: dict[str, Callable[[ModelSection, Tensor], tuple[Tensor, Tensor]]] = {"rope": rotary_tables}
