"""A finished model made ready to be used on a CPU: weights laid out for its products, once.

At one token a product reads every weight once and does little else, and from torch's own layout oneDNN reads
bfloat16 at half of what the memory gives (`benchmarks/decode_cpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.model.joined import join
from llmctl.model.leaves import leaves, swap
from llmctl.model.packed import PackedLinear

LAID_OUT = (torch.bfloat16, torch.float32)
LayOut = Callable[[Tensor, Tensor | None], nn.Module]


class PrepackedLinear(nn.Module):
    """An `nn.Linear` for inference in oneDNN's own layout: the same numbers in the same precision."""

    def __init__(self, weight_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        # tensors of this layout can be neither cast nor moved, so they are no buffers
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 1)
        self.offset = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.offset, "none", [], "")
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class HalfLinear(nn.Module):
    """An `nn.Linear` for inference: 16-bit weights, inputs, sums and outputs in float32 (fbgemm).

    It reads as many bytes as a product in bfloat16 and is about as fast, but gives what float32 would. Of
    bfloat16 logits alone the rounding moves SmolLM2-135M by 0.0003 nats a token, a tenth of what int8 costs it.
    """

    def __init__(self, weight_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        offset = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.detach().float(), offset)

    @staticmethod
    def fits(weight_OI: Tensor) -> bool:
        """16-bit weights that float16 holds, all but their smallest digits, and a CPU that fbgemm knows."""
        known = torch.backends.quantized.engine in ("x86", "fbgemm")
        narrow = weight_OI.dtype in (torch.bfloat16, torch.float16)
        return known and narrow and bool(weight_OI.detach().abs().amax() <= torch.finfo(torch.float16).max)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.ops.quantized.linear_dynamic_fp16(x.flatten(0, -2).float(), self.packed)
        return out.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def ready(model: nn.Module) -> None:
    """Lay out the whole weights of a model on the CPU and join what reads the same input, in place.

    Between quantized products the stream is kept in float32, which they take and give anyway: rounding it to
    bfloat16 would cost accuracy and save nothing.

    The model can then be used, but neither trained nor saved, moved or cast. A model elsewhere, or in a
    precision oneDNN has no layout for, is left as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    packed = any(isinstance(each, PackedLinear) for each in model.modules())
    lay_out = _wide if packed else PrepackedLinear
    join(model, partial(_beside, lay_out))
    # by name, so that each layer can go as soon as its copy stands
    for name in [leaf.name for leaf in leaves(model)]:
        layer: Any = model.get_submodule(name)
        if _is_plain(layer):
            swap(model, name, lay_out(layer.weight, layer.bias))
    if packed:
        _widen(model)


def _wide(weight_OI: Tensor, bias: Tensor | None) -> nn.Module:
    return (HalfLinear if HalfLinear.fits(weight_OI) else PrepackedLinear)(weight_OI, bias)


def _widen(model: nn.Module) -> None:
    """Everything but tables of embeddings in float32; the stack casts what it reads from these."""
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _beside(lay_out: LayOut, parts: list[Any], bias: Tensor | None) -> nn.Module | None:
    if not all(_is_plain(part) for part in parts):
        return None
    return lay_out(torch.cat([part.weight.detach() for part in parts]), bias)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype in LAID_OUT
