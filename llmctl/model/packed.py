"""A linear layer whose weights are a few bits each, in the place of an `nn.Linear`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmctl.kernels.products import PRODUCTS, SAID, Product, path_of
from llmctl.kernels.quantized import Quantized
from llmctl.model.joined import Joinable


class PackedLinear(nn.Module):
    """x [..., I] -> [..., O]. For inference: it has no gradient.

    It is made with the matrix, and computes after `settle` has chosen how.
    """

    def __init__(self, matrix: Quantized, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.codes.shape
        self.bits, self.bias = matrix.bits, bias
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
        for module in [each for each in model.modules() if isinstance(each, Joinable)]:
            _join(module)
    for layer in [each for each in model.modules() if isinstance(each, PackedLinear)]:
        layer.settle(device, exact)


def _join(module: Joinable) -> None:
    parts = [getattr(module, name) for name in module.projections]
    if not all(isinstance(part, PackedLinear) for part in parts):
        return
    whole = beside([part.matrix for part in parts])
    if whole is not None and len({part.bias is None for part in parts}) == 1:
        bias = None if parts[0].bias is None else nn.Parameter(torch.cat([part.bias.data for part in parts]))
        module.join(PackedLinear(whole, bias), [part.out_features for part in parts])


def beside(matrices: Sequence[Quantized]) -> Quantized | None:
    """Matrices of the same input as one; None if they are quantized in different ways."""
    first = matrices[0]
    ways = {(m.bits, m.group, m.zero is None) for m in matrices}
    if len(ways) > 1:
        return None
    return Quantized(
        torch.cat([m.codes for m in matrices]),
        torch.cat([m.scale for m in matrices]),
        None if first.zero is None else torch.cat([m.zero for m in matrices if m.zero is not None]),
        first.bits,
    )


def paths_of(model: nn.Module) -> str:
    """How the quantized layers of a model compute, for a reader; empty if there are none."""
    counts = Counter(module.path for module in model.modules() if isinstance(module, PackedLinear))
    return "; ".join(f"{count} products: {SAID[path]}" for path, count in counts.items())
