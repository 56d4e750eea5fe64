"""What quantization cost and gained, measured on the path that `llmctl chat` runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl.engine.speed import decoding_speeds
from llmctl.kernels.device import Compute
from llmctl.kernels.quantized import Quantized
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.compressed import stored_bytes
from llmctl.model.packed import paths_of
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.stages.compare import held_together
from llmctl.stages.generate import load_for_generation
from llmctl.stages.rows import TalkRows

PROMPT = 16  # tokens before those whose speed is measured


def sizes(model: LlmctlForCausalLM, matrices: Mapping[str, Quantized], target: Path) -> dict[str, Any]:
    """The part of the receipt that is counted.

    Args:
        model: as it was written, but for its quantized layers.
        matrices: those, by name.
        target: where it was written.

    Returns:
        size_bytes_before and size_bytes of all weights, bits_per_weight of the quantized layers with their
        scales, quantized (how many they are), and kept: the layers that stayed in full.
    """
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    weights = sum(matrix.codes.numel() for matrix in matrices.values())
    packed = sum(stored_bytes(matrix) for matrix in matrices.values())
    return {
        "size_bytes_before": whole,
        "size_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
        "bits_per_weight": round(8 * packed / weights, 3),
        "quantized": len(matrices),
        "kept": [leaf.name for leaf in leaves(model) if leaf.name not in matrices],
    }


def measured(folder: Path, target: Path, held: TalkRows, recipe: QuantizeRecipe) -> dict[str, Any]:
    """The part of the receipt that is measured, before and after, as `llmctl chat` would run the two.

    perplexity, tokens_per_second, and what `held_together` finds of both; path says how quantized layers
    compute.
    """
    before, after = (
        load_for_generation(str(where), recipe.device, "auto", "device") for where in (folder, target)
    )
    compute = Compute(after.device, torch.float32)  # the weights' own precision, without autocast
    found = held_together(before, after, held, str(folder), recipe.compare, compute)
    prompt, tokens = _decoded(held, after, recipe.compare.speed_tokens)
    speeds = decoding_speeds((before, after), prompt, tokens)
    return {
        "perplexity_before": found.pop("perplexity_a"),
        "perplexity": found.pop("perplexity_b"),
        "tokens_per_second_before": round(speeds[0], 1),
        "tokens_per_second": round(speeds[1], 1),
        "path": paths_of(after),
        **found,
    }


def _decoded(held: TalkRows, model: LlmctlForCausalLM, tokens: int) -> tuple[list[int], int]:
    """A prompt from the text, and how many tokens to decode after it."""
    room = model.config.max_position_embeddings
    prompt = held.laid.ids[:PROMPT].tolist()[: max(1, room // 2)]
    return prompt, max(2, min(tokens, room - len(prompt)))


def card(recipe: QuantizeRecipe, found: Mapping[str, Any]) -> str:
    """The model card: what this model was made from, how, and the receipt, in Markdown."""
    settings = recipe.quantize
    rows = [
        ("weights", *(f"{found[key] / 2**20:,.2f} MiB" for key in ("size_bytes_before", "size_bytes"))),
        ("perplexity", *(f"{found[key]:.4g}" for key in ("perplexity_before", "perplexity"))),
        (
            "decoding, tokens/s",
            *(f"{found[key]:,.1f}" for key in ("tokens_per_second_before", "tokens_per_second")),
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [("", "before", "after"), ("---",) * 3, *rows])
    group = "channel" if settings.group is None else f"group of {settings.group}"
    kept = ", ".join(f"`{name}`" for name in found["kept"])
    return CARD.format(
        base=recipe.base,
        method=settings.method,
        bits=settings.bits,
        group=group,
        bits_per_weight=found["bits_per_weight"],
        quantized=found["quantized"],
        kept=kept or "none",
        table=table,
        top1=found["top1"],
        kl=found["kl"],
        tokens=found["tokens"],
        path=found["path"],
    )


CARD = """\
# {base}, quantized

Made from `{base}` by `llmctl quantize --method {method}`: {bits} bits, one scale a {group},
{bits_per_weight} bits a weight with the scales, in {quantized} layers. In full: the embedding, the norms, and {kept}.

{table}

On {tokens:,} tokens of held-out data the two prefer the same next token at {top1:.2%} of the places, and diverge by
{kl:.4g} nats a token (KL). Measured as `llmctl chat` runs it: {path}.

The format is compressed-tensors, `pack-quantized`: `AutoModelForCausalLM.from_pretrained` opens this folder where the
package compressed-tensors is installed.
"""
