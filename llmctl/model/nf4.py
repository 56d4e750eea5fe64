"""A frozen base in four bits: NF4 with double quantization, as QLoRA trains on (Dettmers et al. 2023,
arXiv:2305.14314), by way of bitsandbytes.

A pass over the leaves; bitsandbytes is imported where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.model.hf import LlmctlPreTrainedModel
from llmctl.model.leaves import leaves

BLOCK = 64  # weights that share a scale


def quantize_nf4(model: LlmctlPreTrainedModel, compute: torch.dtype) -> None:
    """Replace every leaf but the head by its NF4 form, in place. Products run in `compute`.

    Raises UserError if bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    for leaf in list(leaves(model)):
        if leaf.kind != "linear":
            continue
        old: Any = leaf.module
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, compute, True, "nf4", device="meta"
        )
        device = old.weight.device
        packed = bnb.nn.Params4bit(
            old.weight.data.float().contiguous(),
            requires_grad=False,
            quant_type="nf4",
            blocksize=BLOCK,
            compress_statistics=True,
        )
        new.weight = packed.to(device)
        new.bias = old.bias
        _replace(model, leaf.name, new)
    model.is_loaded_in_4bit = True  # how PEFT knows


def round_nf4(model: LlmctlPreTrainedModel) -> None:
    """Round every leaf but the head to what NF4 can hold, keeping ordinary weights, in place.

    The model an adapter of `quantize_nf4` was trained on, in a form that adapters can be folded into.
    """
    functional = _bitsandbytes().functional
    for leaf in leaves(model):
        if leaf.kind == "linear":
            weight: Any = leaf.module.weight
            packed, state = functional.quantize_4bit(
                weight.data.float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            weight.data = functional.dequantize_4bit(packed, state).to(weight.dtype)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, module)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"four-bit bases need bitsandbytes, which cannot be imported ({error})",
            "pip install bitsandbytes, or train with --lora",
        ) from None
    return bitsandbytes
