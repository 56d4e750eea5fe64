"""What `llmctl quantize` will take: time, memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.open import stored_dtype
from llmctl.plan.size import total_parameters
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.stages.compare import counts
from llmctl.stages.costs import comparison, comparison_memory, plan, tokenizer_bytes
from llmctl.stages.rows import TalkRows

SCALE_BITS = 32  # of a scale and, where the codes are not symmetric, its zero point
PASSES = 5  # over the held-out rows: intended and read back, before and read back, before with noise
COPIES = 4  # of the weights in float32 at the peak: intended, read back, before, and one being laid out


def quantized_disk(
    recipe: QuantizeRecipe, model: LlmctlForCausalLM, chosen: list[str], folder: Path
) -> dict[str, int]:
    """Bytes of the quantized model: the codes and scales of the `chosen` layers, the rest as it was."""
    settings, names = recipe.quantize, set(chosen)
    assert settings.bits is not None
    # an integer of 32 bits holds ten codes of 3 bits, and wastes two
    stored = 32 / (32 // settings.bits)
    bits, inside = 0.0, 0
    for leaf in leaves(model):
        if leaf.name in names:
            outputs, inputs = leaf.module.weight.shape
            scales = outputs * -(-inputs // (settings.group or inputs))
            bits += outputs * inputs * stored + scales * SCALE_BITS
            inside += outputs * inputs
    rest = sum(weight.numel() for weight in model.parameters()) - inside
    weights = round(bits / 8) + rest * stored_dtype(folder).itemsize
    return {"result": weights + tokenizer_bytes(folder)}


def plan_quantization(
    recipe: QuantizeRecipe,
    model: LlmctlForCausalLM,
    chosen: list[str],
    rows: tuple[TalkRows | None, TalkRows],
    disk: dict[str, int],
    out: Path,
    device: torch.device,
) -> dict[str, Any]:
    """The plan of a quantization whose inputs were checked; `rows` are those to quantize by, and to measure on."""
    spec, (by, held) = model.config.spec, rows
    compute = Compute(device, torch.float32)
    memory = comparison_memory(spec, held, recipe.compare, COPIES, 4)
    flops, facts = 0.0, counts(held, recipe.compare)
    if by is not None:
        used = min(recipe.quantize.calibration_rows, len(by.laid.rows))
        tokens = round(used * int(by.laid.pieces.length.sum()) / max(1, len(by.laid.rows)))
        facts["calibration_tokens"] = tokens
        if recipe.quantize.method == "gptq":
            flops = _gptq_flops(model, chosen, tokens)
    work = comparison(
        held, recipe.compare, compute, PASSES, moved=3 * memory["weights"] / COPIES, flops=flops
    )
    shown = {"device": str(compute), "parameters": total_parameters(spec), "layers": len(chosen), **facts}
    return plan(shown, work.seconds(spec), memory, disk, out, compute.device)


def _gptq_flops(model: LlmctlForCausalLM, chosen: list[str], tokens: int) -> float:
    """Two passes over the calibration tokens, a Hessian of a layer's inputs, its inverse, and a row after a row."""
    names, found = set(chosen), 0.0
    for leaf in leaves(model):
        if leaf.name in names:
            outputs, inputs = leaf.module.weight.shape
            found += 2 * 2 * tokens * outputs * inputs
            # layers that read the same inputs share their Hessian, so about two of three have one
            found += 2 / 3 * 2 * tokens * inputs**2
            found += 2 * inputs**3 + 2 * outputs * inputs**2
    return found
