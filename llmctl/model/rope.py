"""Rotary positions: the angles by which pairs of channels are turned, and how they are stretched.

Shape legend: B rows, T tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmctl.recipe.model import ModelSection
from llmctl.recipe.rope import RopeDefault, RopeLinear, RopeLlama3, RopeNtk, RopeYarn


def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    """theta^(-2i/width) for each of the width/2 pairs of channels (Su et al. 2021, arXiv:2104.09864)."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def _default(rope: RopeDefault, width: int, device: torch.device) -> Tensor:
    return _frequencies(rope.rope_theta, width, device)


def _linear(rope: RopeLinear, width: int, device: torch.device) -> Tensor:
    return _frequencies(rope.rope_theta, width, device) / rope.factor


def ntk_theta(rope: RopeNtk, width: int) -> float:
    """The base that makes the slowest pair of `width` channels turn `factor` times slower."""
    return rope.rope_theta * rope.factor ** (width / (width - 2))


def _ntk(rope: RopeNtk, width: int, device: torch.device) -> Tensor:
    return _frequencies(ntk_theta(rope, width), width, device)


def _yarn(rope: RopeYarn, width: int, device: torch.device) -> Tensor:
    """Pairs that turn less than `beta_slow` times in the old context are stretched, beyond `beta_fast` kept."""

    def pair_that_turns(times: float) -> float:
        length = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = _frequencies(rope.rope_theta, width, device)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


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
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
}


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """0.1 · weight · ln(factor) + 1, YaRN's temperature; 1 for contexts that are not longer."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_scale(model: ModelSection) -> float:
    """What cos and sin are multiplied by: more than 1 with YaRN, which warms the scores of longer contexts."""
    rope = model.rope_parameters
    if not isinstance(rope, RopeYarn):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor)


def rotary_tables(model: ModelSection, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, D/2], float32, for all heads, of the angles by which each pair of channels is turned.

    Computed anew each pass: it is a few microseconds, and there is no buffer to lose when a model
    is made on the meta device, sharded or cast.
    """
    rope = model.rope_parameters
    assert model.head_dim is not None
    frequencies = ROPE_TYPES[rope.rope_type](rope, model.head_dim, position_BT.device)
    angles = position_BT[:, None, :, None].float() * frequencies
    scale = rotary_scale(model)
    if scale == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * scale, angles.sin() * scale
