"""Weight matrices in a few bits, and the definition of a product with one.

Shape legend: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """A matrix in integers: W[o, i] = (codes[o, i] - zero[o, g]) · scale[o, g], with g = i // group.

    Attributes:
        codes: int8 [O, I] in -2^(bits-1) … 2^(bits-1)-1.
        scale: float32 [O, G]. Below 8 bits of values that bfloat16 holds exactly (`rounded_scale`), because
            the fast operator takes it in that precision. I is a multiple of G.
        zero: int8 [O, G] in the range of the codes; None where it is 0 everywhere (symmetric).
        bits: 8, 4 or 3.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """The matrix it stands for, float32 [O, I]."""
        codes = self.codes.unflatten(1, (-1, self.group)).float()
        if self.zero is not None:
            codes = codes - self.zero[..., None].float()
        return (codes * self.scale[..., None]).flatten(1)


def rounded_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: rounded up to what bfloat16 holds, so that no code leaves its range."""
    narrow = scale.bfloat16()
    # scales are positive, so the next number up is the next pattern of bits
    above = (narrow.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(narrow.float() < scale, above, narrow).float()
