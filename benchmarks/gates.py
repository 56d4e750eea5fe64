"""Claim: a right merge and a right quantization of a real bfloat16 model pass their gates, and planted faults do not.

ADAPTER is a run of `llmctl sft --lora`, QUANTIZED one of `llmctl quantize` with groups; a second one with zero points
(quantize.symmetric=false) adds their fault. Each fault is put into a copy of the files, which is held against what
was to be written, as the stage does it.

    python benchmarks/gates.py runs/sft runs/gptq4 runs/gptq4-zeros --data held-out.jsonl --tokens 2048
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmctl.kernels.device import Compute
from llmctl.kernels.packing import pack_words, unpack_words
from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import save_model
from llmctl.model.open import open_base, open_folded, open_model, stored_dtype
from llmctl.recipe.tune import CompareRows
from llmctl.stages.compare import held_together, shared_rows
from llmctl.stages.gate import faithful_kl, out_of_bounds, rounded_dtype
from llmctl.stages.generate import load_for_generation
from llmctl.stages.receipt import FAITHFUL_TOP1
from llmctl.stages.rows import TalkRows
from llmctl.talk import SILENT

FLOAT = Compute(torch.device("cpu"), torch.float32)
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
Fault = Callable[[Tensors], None]


def flipped_bits(tensors: Tensors) -> None:
    """A random bit of each hundredth weight turned over."""
    random = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).view(-1)
        width = 8 * tensor.element_size()
        chosen = (torch.rand(bits.shape, generator=random) < 0.01).nonzero().squeeze(1)
        place = torch.randint(0, width - 1, (len(chosen),), generator=random)
        bits[chosen] ^= (1 << place).to(bits.dtype)


def transposed_scales(tensors: Tensors) -> None:
    """The scales of one layer in the other order."""
    name = _layer(tensors, ".weight_scale")
    tensors[name] = tensors[name].t().reshape(tensors[name].shape).contiguous()


def zeros_off_by_one(tensors: Tensors) -> None:
    """The zero points of one layer, one too far."""
    name = _layer(tensors, ".weight_zero_point")
    outputs = tensors[name.replace("zero_point", "scale")].shape[0]
    zero = unpack_words(tensors[name].t().contiguous(), 4, outputs)
    tensors[name] = pack_words((zero + 1).clamp(-8, 7), 4).t().contiguous()


def _layer(tensors: Tensors, end: str) -> str:
    """The tensor of this kind in the middle of the model."""
    names = sorted(name for name in tensors if name.endswith("q_proj" + end))
    return names[len(names) // 2]


def damaged(folder: Path, fault: Fault, place: Path) -> Path:
    """A copy of a model with a fault in its weights."""
    copy = place / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("run.json", "recipe.yaml"))
    tensors = load_file(copy / WEIGHTS)
    fault(tensors)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    return copy


class Gate:
    """Rows, and a line for each pair of models that is held together on them."""

    def __init__(self, rows: TalkRows, tokenizer: str, settings: CompareRows) -> None:
        self.rows, self.tokenizer, self.settings = rows, tokenizer, settings
        self.lines: list[dict[str, Any]] = []

    def line(
        self, what: str, a: LlmctlForCausalLM, b: LlmctlForCausalLM, noise: torch.dtype | None, right: bool
    ) -> None:
        """Measure a case, print it, and keep it."""
        found = held_together(a, b, self.rows, self.tokenizer, self.settings, FLOAT, noise)
        failed = out_of_bounds(found, FAITHFUL_TOP1, faithful_kl(found))
        kept = ("kl", "noise_kl", "decided", "decided_top1", "top1")
        line = {"case": what, "allowed_kl": faithful_kl(found), "passes": not failed, "right": right}
        self.lines.append(line | {name: found.get(name) for name in kept})
        print(json.dumps(self.lines[-1]), flush=True)


def merges(gate: Gate, adapter: str, place: Path) -> None:
    """An adapter against models folded in float32, and the rounded one in memory against files: right ones, and others."""
    adapted, base = open_model(adapter, torch.float32), open_base(Path(adapter), torch.float32)
    gate.line("dead adapter", adapted, base, None, False)
    for factor in (2.0, 0.5, 1.25, 1.0):
        folded = open_folded(adapter, torch.float32)
        with torch.no_grad():
            for name, weight in folded.named_parameters():
                weight.lerp_(base.get_parameter(name), 1 - factor)
        gate.line(f"alpha times {factor:g}", adapted, folded, None, factor == 1)
    file = place / "merged"
    save_model(folded.to(stored_dtype(adapter)), file)
    rounded = folded.float()
    gate.line("right file", rounded, open_model(file, torch.float32), None, True)
    bad = damaged(file, flipped_bits, place)
    gate.line("one bit in a hundred weights", rounded, open_model(bad, torch.float32), None, False)
    gate.line("rounding itself, which is not judged", adapted, rounded, rounded_dtype(adapter), True)


def quantizations(gate: Gate, folder: str, place: Path) -> None:
    """What was written against what is read back, as `llmctl chat` runs it."""
    intended = open_model(folder, torch.float32, exact=True)
    noise = torch.bfloat16
    gate.line(f"{folder}: right", intended, load_for_generation(folder, "cpu", "auto"), noise, True)
    names = load_file(Path(folder) / WEIGHTS)
    faults: dict[str, Fault] = {}
    if any(tensor.dim() == 2 and tensor.shape[1] > 1 for n, tensor in names.items() if n.endswith("_scale")):
        faults["scales of one layer transposed"] = transposed_scales
    if any(name.endswith("zero_point") for name in names):
        faults["zero points of one layer off by one"] = zeros_off_by_one
    for what, fault in faults.items():
        read = load_for_generation(str(damaged(Path(folder), fault, place)), "cpu", "auto")
        gate.line(f"{folder}: {what}", intended, read, noise, False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter")
    parser.add_argument("quantized", nargs="*")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = CompareRows(data=options.data, answers=0, max_tokens=options.tokens)
    with tempfile.TemporaryDirectory() as place:
        gate = Gate(
            shared_rows(options.adapter, options.adapter, settings, SILENT), options.adapter, settings
        )
        merges(gate, options.adapter, Path(place))
        for folder in options.quantized:
            gate = Gate(shared_rows(folder, folder, settings, SILENT), folder, settings)
            quantizations(gate, folder, Path(place))


if __name__ == "__main__":
    main()
