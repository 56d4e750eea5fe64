"""What quantization cost and gained, measured on the path that `llmctl chat` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llmctl.engine.speed import ROUNDS, decoding_speeds
from llmctl.kernels.device import Compute
from llmctl.kernels.quantized import Quantized
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.compressed import stored_bytes
from llmctl.model.open import open_folded, stored_dtype
from llmctl.model.packed import paths_of
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.stages.compare import held_together
from llmctl.stages.gate import faithful_kl, out_of_bounds
from llmctl.stages.generate import load_for_generation
from llmctl.stages.rows import TalkRows
from llmctl.talk import Talk

PROMPT = 16  # tokens before those whose speed is measured
FAITHFUL_TOP1 = 0.99  # of decided tokens, between what was written and what was read back
WRITTEN = {"answers": 0, "max_tokens": 2048}  # that is enough to find a fault in one layer of many


@dataclass(frozen=True)
class Receipt:
    """A quantization whose result is to be measured.

    Attributes:
        folder: the model before.
        held: rows that it was not quantized by.
    """

    folder: Path
    recipe: QuantizeRecipe
    held: TalkRows
    tokenizer: PreTrainedTokenizerFast
    talk: Talk

    def sizes(
        self, model: LlmctlForCausalLM, matrices: Mapping[str, Quantized], target: Path
    ) -> dict[str, Any]:
        """The part of the receipt that is counted.

        Args:
            model: as it was written, but for its quantized layers.
            matrices: those, by name.
            target: where it was written.

        Returns:
            size_bytes_before and size_bytes of all weights, bits_per_weight of the quantized layers with their
            scales, quantized (how many they are), and kept: the layers that stayed in full.
        """
        width = stored_dtype(self.folder).itemsize
        weights = sum(matrix.codes.numel() for matrix in matrices.values())
        packed = sum(stored_bytes(matrix) for matrix in matrices.values())
        return {
            "size_bytes_before": width * sum(weight.numel() for weight in model.parameters()),
            "size_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
            "bits_per_weight": round(8 * packed / weights, 3),
            "quantized": len(matrices),
            "kept": [leaf.name for leaf in leaves(model) if leaf.name not in matrices],
        }

    def measured(self, intended: LlmctlForCausalLM, target: Path) -> dict[str, Any]:
        """The part of the receipt that is measured on what was read back, as `llmctl chat` would run it.

        Against the model before, in float32: perplexity, tokens_per_second (of both as chat runs them), and what
        `held_together` finds; path says how quantized layers compute. Against the intended model: written_kl,
        and in `failed` whether it is more than rounding explains.
        """
        with self.talk.bar("reading back", None, ""):
            after = load_for_generation(str(target), self.recipe.device, "auto", "device")
        compute = Compute(after.device, torch.float32)  # the weights' own precision, without autocast
        written = self._compared(intended.to(after.device), after, compute, WRITTEN)
        before = open_folded(self.folder, torch.float32, after.device)
        found = self._compared(before, after, compute, {})
        del before
        plain = load_for_generation(str(self.folder), self.recipe.device, "auto", "device")
        prompt, tokens = _decoded(self.held, after, self.recipe.compare.speed_tokens)
        with self.talk.bar("measuring speed", 2 * ROUNDS * tokens, "tokens") as bar:
            speeds = decoding_speeds((plain, after), prompt, tokens, bar.advance)
        drift = out_of_bounds(written, FAITHFUL_TOP1, faithful_kl(written))
        return {
            "perplexity_before": found.pop("perplexity_a"),
            "perplexity": found.pop("perplexity_b"),
            "tokens_per_second_before": round(speeds[0], 1),
            "tokens_per_second": round(speeds[1], 1),
            "path": paths_of(after),
            **found,
            "written_kl": written["kl"],
            "failed": [f"what was read back is not what was written: {line}" for line in drift],
        }

    def _compared(
        self, a: LlmctlForCausalLM, b: LlmctlForCausalLM, compute: Compute, less: Mapping[str, int]
    ) -> dict[str, Any]:
        settings = self.recipe.compare.model_copy(update=less)
        # operators take tokens in bfloat16, whatever the weights are stored in
        noise = torch.bfloat16
        return held_together(a, b, self.held, str(self.folder), settings, compute, noise, self.talk)


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
        failed="".join(f"\n**Its own check refuses it**: {line}.\n" for line in found["failed"]),
    )


CARD = """\
# {base}, quantized

Made from `{base}` by `llmctl quantize --method {method}`: {bits} bits, one scale a {group},
{bits_per_weight} bits a weight with the scales, in {quantized} layers. In full: the embedding, the norms, and {kept}.

{failed}
{table}

On {tokens:,} tokens of held-out data the two prefer the same next token at {top1:.2%} of the places, and diverge by
{kl:.4g} nats a token (KL). Measured as `llmctl chat` runs it: {path}.

The format is compressed-tensors, `pack-quantized`: `AutoModelForCausalLM.from_pretrained` opens this folder where the
package compressed-tensors is installed.
"""
