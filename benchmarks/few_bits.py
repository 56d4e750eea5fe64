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

from llmctl.data.batches import eval_batches
from llmctl.engine.speed import decoding_speed
from llmctl.evaluate.parity import parity
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.open import open_model
from llmctl.recipe.tune import CompareRows
from llmctl.stages.compare import shared_rows
from llmctl.stages.generate import load_for_generation
from llmctl.stages.text import fitting_tokenizer, pad_id_of
from llmctl.talk import SILENT

FLOAT = Compute(torch.device("cpu"), torch.float32)
GGUF = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
PROMPT, NEW = 16, 64


def through_gguf(model: LlmctlForCausalLM, kind: GGMLQuantizationType) -> LlmctlForCausalLM:
    """The model with its linear layers as a file of this kind holds them, in place."""
    for leaf in leaves(model):
        if leaf.kind == "linear":
            packed = quants.quantize(leaf.module.weight.detach().numpy(), kind)
            leaf.module.weight.data = torch.from_numpy(quants.dequantize(packed, kind))
    return model


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
    settings = CompareRows(data=options.data)
    rows = shared_rows(options.model, options.model, settings, SILENT)
    pad = pad_id_of(fitting_tokenizer(options.model))
    reference = open_model(options.model, torch.float32)

    def measured(name: str, other: LlmctlForCausalLM) -> None:
        batches = eval_batches(rows.laid, batch_size=8, pad_id=pad)
        found = parity(reference, other, batches, FLOAT, max_tokens=options.tokens).figures()
        error = "" if math.isnan(found["kl_error"]) else f" ± {found['kl_error']:.5f}"
        print(
            f"{name:28} KL {found['kl']:.5f}{error}  top-1 {found['top1']:.2%}  perplexity "
            f"{found['perplexity_a']:.3f} -> {found['perplexity_b']:.3f}  ({found['tokens']:,} tokens)",
            flush=True,
        )

    places = [options.model, *options.quantized]
    used = {place: load_for_generation(place, "cpu", "auto") for place in places}
    for place, model in used.items():
        measured(place, model)
    for name, kind in GGUF.items():
        measured(name, through_gguf(open_model(options.model, torch.float32), kind))
    prompt = rows.laid.ids[:PROMPT].tolist()
    speeds: dict[str, list[float]] = {place: [] for place in places}
    for _ in range(options.rounds):
        for place, model in used.items():
            speeds[place].append(decoding_speed(model, prompt, NEW))
    report({"threads": options.threads, "new tokens": NEW, "tokens per second": speeds})


if __name__ == "__main__":
    main()
