"""A finished model made ready to be used on a CPU: weights laid out for its products, once.

At one token a product reads every weight once and does little else, and from torch's own layout oneDNN reads
bfloat16 at half of what the memory gives (`benchmarks/decode_cpu.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmctl.model.joined import join
from llmctl.model.leaves import leaves, swap

LAID_OUT = (torch.bfloat16, torch.float32)


class PrepackedLinear(nn.Module):
    """An `nn.Linear` for inference in oneDNN's own layout: the same numbers in the same precision."""

    def __init__(self, weight_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        # tensors of this layout can be neither cast nor moved, so they are no buffers
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 1)
        self.offset = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.offset, "none", [], "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def ready(model: nn.Module) -> None:
    """Lay out the whole weights of a model on the CPU and join what reads the same input, in place.

    The model can then be used, but neither trained nor saved, moved or cast. A model elsewhere, or in a
    precision oneDNN has no layout for, is left as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    join(model, _beside)
    # by name, so that each layer can go as soon as its copy stands
    for name in [leaf.name for leaf in leaves(model)]:
        layer: Any = model.get_submodule(name)
        if _is_plain(layer):
            swap(model, name, PrepackedLinear(layer.weight, layer.bias))


def _beside(parts: list[Any], bias: Tensor | None) -> PrepackedLinear | None:
    if not all(_is_plain(part) for part in parts):
        return None
    return PrepackedLinear(torch.cat([part.weight.detach() for part in parts]), bias)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype in LAID_OUT
