"""PEFT's adapted matrix with the forward pass of `kernels/lora.py`. Importing this imports PEFT."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from llmctl.kernels.lora import lora_linear


class LoraLinear(lora.Linear):
    """As PEFT's, whose parameters, files and merging it has; in training, one operation where PEFT has several."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training or args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        name, base = self.active_adapters[0], self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, a, b, self.scaling[name])

    def _is_plain(self) -> bool:
        """Whether one adapter is at work that is nothing but two matrices."""
        if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        return (
            name in self.lora_A
            and self.lora_B[name].bias is None
            and type(self.lora_dropout[name]) is nn.Identity
        )


def fuse(model: nn.Module) -> None:
    """Let every adapted matrix of ordinary weights compute in one operation, in place."""
    for module in model.modules():
        # not the kinds of quantized weights, which have layers of their own
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
