"""Claim: on a real model int8 as `llmctl chat` runs it costs little more than bfloat16, and fewer bits less than GGUF's.

Every folder is opened as chat opens it and held against MODEL in float32 on the same rows: KL in nats per token,
agreement on the next token, perplexity. `q8_0` and `q4_0` are MODEL with its linear layers through the package gguf and
back (the file's own embedding stays, as in ours), computed in float32. Tokens per second are decoded in turn.

    python benchmarks/few_bits.py smollm2 runs/int8 runs/gptq4 --data enwiki-valid.jsonl --tokens 20480
"""

from __future__ import annotations

import argparse
import math

import torch
from gguf import GGMLQuantizationType, quants
from timing import report

from llmctl.data.batches import Batch, eval_batches
from llmctl.engine.speed import decoding_speed
from llmctl.kernels.cross_entropy import IGNORE
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.open import open_model
from llmctl.recipe.tune import CompareRows
from llmctl.stages.compare import shared_rows
from llmctl.stages.generate import load_for_generation
from llmctl.stages.text import fitting_tokenizer, pad_id_of
from llmctl.talk import SILENT

GGUF = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
PROMPT, NEW = 16, 64


def through_gguf(model: LlmctlForCausalLM, kind: GGMLQuantizationType) -> LlmctlForCausalLM:
    """The model with its linear layers as a file of this kind holds them, in place."""
    for leaf in leaves(model):
        if leaf.kind == "linear":
            packed = quants.quantize(leaf.module.weight.detach().numpy(), kind)
            leaf.module.weight.data = torch.from_numpy(quants.dequantize(packed, kind))
    return model


class Figures:
    """Sums over the predicted tokens of one model, beside the reference."""

    def __init__(self) -> None:
        self.kl = self.agreed = self.nats = 0.0
        self.tokens = 0

    def add(self, reference: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> None:
        """Log-probabilities [N, V] of both at N places, and the tokens that came, [N]."""
        self.kl += float((reference.exp() * (reference - other)).sum())
        self.agreed += float((reference.argmax(-1) == other.argmax(-1)).sum())
        self.nats -= float(other.gather(1, labels[:, None]).sum())
        self.tokens += len(labels)

    def __str__(self) -> str:
        n = self.tokens
        return f"KL {self.kl / n:.5f}  top-1 {self.agreed / n:.2%}  perplexity {math.exp(self.nats / n):.3f}  ({n:,} tokens)"


@torch.inference_mode()
def log_probabilities(model: LlmctlForCausalLM, batch: Batch, kept: torch.Tensor) -> torch.Tensor:
    """At the places that predict a label, [N, V]."""
    hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    return model.head(hidden[:, :-1][kept]).float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("quantized", nargs="*")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = shared_rows(options.model, options.model, CompareRows(data=options.data, max_rows=10**6), SILENT)
    pad = pad_id_of(fitting_tokenizer(options.model))
    reference = open_model(options.model, torch.float32)
    places = [options.model, *options.quantized]
    used = {place: load_for_generation(place, "cpu", "auto") for place in places}
    others = used | {
        name: through_gguf(open_model(options.model, torch.float32), kind) for name, kind in GGUF.items()
    }
    figures = {name: Figures() for name in ["float32", *others]}
    for batch in eval_batches(rows.laid, batch_size=2, pad_id=pad):
        kept = batch["labels"][:, 1:] != IGNORE
        labels = batch["labels"][:, 1:][kept]
        exact = log_probabilities(reference, batch, kept)
        figures["float32"].add(exact, exact, labels)
        for name, model in others.items():
            figures[name].add(exact, log_probabilities(model, batch, kept), labels)
        if figures["float32"].tokens >= options.tokens:
            break
    for name, found in figures.items():
        print(f"{name:28} {found}", flush=True)
    prompt = rows.laid.ids[:PROMPT].tolist()
    speeds: dict[str, list[float]] = {place: [] for place in places}
    for _ in range(options.rounds):
        for place, model in used.items():
            speeds[place].append(decoding_speed(model, prompt, NEW))
    report({"threads": options.threads, "new tokens": NEW, "tokens per second": speeds})


if __name__ == "__main__":
    main()
