"""Round to nearest: what quantization is without data, and what every other method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.kernels.quantized import Quantized
from llmctl.quantize.scales import absmax_scale, codes_of, group_size


def absmax(weight_OI: Tensor, bits: int, group: int | None) -> Quantized:
    """Every weight to the nearest code, at scales that cut none: |w - q| <= scale/2.

    Args:
        weight_OI: of any floating type.
        bits: of a code, 2 to 8.
        group: inputs that share a scale; None gives every output one.

    Raises ValueError if the inputs are no whole groups.
    """
    weight = weight_OI.float().unflatten(1, (-1, group_size(weight_OI.shape[1], group)))
    scale = absmax_scale(weight, bits)
    codes = codes_of(weight, scale[..., None], 0.0, bits)
    return Quantized(codes.flatten(1).to(torch.int8), scale, None, bits)
