"""A linear layer whose weights are a few bits each, in the place of an `nn.Linear`."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from llmctl.kernels.products import PRODUCTS, SAID, path_of
from llmctl.kernels.quantized import Quantized


class PackedLinear(nn.Module):
    """x [..., I] -> [..., O] by one of `kernels/products.py`. For inference: it has no gradient.

    Args:
        exact: multiply by the weights exactly as they are stored, however slow, instead of by the fastest
            path; what other readers of the format do.
    """

    def __init__(
        self, matrix: Quantized, bias: nn.Parameter | None, device: torch.device, exact: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.codes.shape
        self.bits = matrix.bits
        self.path = "exact" if exact else path_of(matrix, device)
        self.bias = bias
        # not a buffer: what a kernel holds is its own, and a cast of the model must leave it alone
        self.product = PRODUCTS[self.path](matrix, device)

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, path={self.path}"


def paths_of(model: nn.Module) -> str:
    """How the quantized layers of a model compute, for a reader; empty if there are none."""
    counts = Counter(module.path for module in model.modules() if isinstance(module, PackedLinear))
    return "; ".join(f"{count} layers: {SAID[path]}" for path, count in counts.items())
