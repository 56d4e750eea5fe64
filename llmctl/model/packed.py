"""A linear layer whose weights are a few bits each, in the place of an `nn.Linear`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.kernels.products import PRODUCTS, SAID, Product, path_of
from llmctl.kernels.quantized import Quantized
from llmctl.model.compressed import stored_bytes
from llmctl.model.joined import join


class PackedLinear(nn.Module):
    """x [..., I] -> [..., O]. For inference: it has no gradient.

    It is made with the matrix, and computes after `settle` has chosen how.
    """

    def __init__(self, matrix: Quantized, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.codes.shape
        self.bits, self.bias, self.stored_bytes = matrix.bits, bias, stored_bytes(matrix)
        # neither is a buffer: what a kernel holds is its own, and a cast of the model must leave it alone
        self.matrix: Quantized | None = matrix
        self.product: Product | None = None
        self.path = "none"

    def settle(self, device: torch.device, exact: bool) -> None:
        """Choose how to multiply, and let go of the matrix.

        Args:
            exact: multiply by the weights exactly as they are stored, however slow, instead of by the
                fastest path; what other readers of the format do.
        """
        assert self.matrix is not None
        self.path = "exact" if exact else path_of(self.matrix, device)
        self.product, self.matrix = PRODUCTS[self.path](self.matrix, device), None

    def forward(self, x: Tensor) -> Tensor:
        assert self.product is not None, "settle() comes first"
        out = self.product(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, path={self.path}"


def settle(model: nn.Module, device: torch.device, exact: bool) -> None:
    """Make the packed layers of a model ready to compute, in place; without `exact` joined where they can be."""
    if not exact:
        join(model, _beside)
    for layer in [each for each in model.modules() if isinstance(each, PackedLinear)]:
        layer.settle(device, exact)


def _beside(parts: list[Any], bias: Tensor | None) -> PackedLinear | None:
    """None if the layers are not all packed, and in the same way."""
    matrices = [part.matrix for part in parts if isinstance(part, PackedLinear)]
    if len(matrices) < len(parts) or len({(m.bits, m.group, m.zero is None) for m in matrices}) > 1:
        return None
    zeros = [m.zero for m in matrices if m.zero is not None]
    whole = Quantized(
        torch.cat([m.codes for m in matrices]),
        torch.cat([m.scale for m in matrices]),
        torch.cat(zeros) if zeros else None,
        matrices[0].bits,
    )
    return PackedLinear(whole, None if bias is None else nn.Parameter(bias))


def paths_of(model: nn.Module) -> str:
    """How the quantized layers of a model compute, for a reader; empty if there are none."""
    counts = Counter(module.path for module in model.modules() if isinstance(module, PackedLinear))
    return "; ".join(f"{count} products: {SAID[path]}" for path, count in counts.items())
