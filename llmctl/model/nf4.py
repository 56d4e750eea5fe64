"""A frozen base in four bits: NF4 with double quantization, as QLoRA trains on (Dettmers et al. 2023,
arXiv:2305.14314), by way of bitsandbytes.

A pass over the leaves; bitsandbytes is imported where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.errors import UserError
from llmctl.model.hf import LlmctlPreTrainedModel
from llmctl.model.leaves import leaves, swap

BLOCK = 64  # weights that share a scale


def quantize_nf4(model: LlmctlPreTrainedModel, compute: torch.dtype) -> None:
    """Replace every leaf but the head by its NF4 form, in place. Products run in `compute`.

    Rows are filled up with zeros to whole blocks: the CPU kernel would read wrong scales for others.

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
        packed = bnb.nn.Params4bit(
            _whole_blocks(old.weight.data.float()),
            requires_grad=False,
            quant_type="nf4",
            blocksize=BLOCK,
            compress_statistics=True,
        )
        new.weight = packed.to(old.weight.device)
        new.bias = old.bias
        # The layout that bitsandbytes changes to on some CPUs at the first evaluation has no gradient, and
        # it is kept when training goes on.
        new.support_avx512bf16_for_cpu = False
        if old.in_features % BLOCK:
            new.register_forward_pre_hook(_with_whole_blocks)
        swap(model, leaf.name, new)
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
                _whole_blocks(weight.data.float()),
                blocksize=BLOCK,
                compress_statistics=True,
                quant_type="nf4",
            )
            rounded = functional.dequantize_4bit(packed, state)
            weight.data = rounded[:, : weight.shape[1]].to(weight.dtype).contiguous()


def _whole_blocks(rows: Tensor) -> Tensor:
    """[..., N] with zeros up to a multiple of BLOCK."""
    return F.pad(rows, (0, -rows.shape[-1] % BLOCK)).contiguous()


def _with_whole_blocks(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_whole_blocks(inputs[0]), *inputs[1:])


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"four-bit bases need bitsandbytes, which cannot be imported ({error})",
            "pip install bitsandbytes, or train with --lora",
        ) from None
    return bitsandbytes
