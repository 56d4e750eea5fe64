"""Claim: on text that was not calibrated on, GPTQ in the order of the columns errs less than round to nearest,
and GPTQ by the size of the inputs less again.

For every linear layer of a model, ||XW^T - XQ^T||² / ||XW^T||² over the tokens X of held-out text, where Q is W

    nearest     rounded to nearest, at scales that cut no weight
    scales      rounded to nearest, at the scales GPTQ chooses: what is left of it without compensation
    gptq        by GPTQ, columns as they stand in the matrix
    ordered     by GPTQ, columns with the largest inputs first; what `llmctl quantize` does

X is what the unquantized model gives the layer, so that all sides read the same and a layer's error is its own.
Layers whose inputs are no whole groups are left out. Figures are means over the layers of a kind, and over all layers.

    python benchmarks/gptq_error.py runs/base train.jsonl valid.jsonl --tokens 32768
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from timing import report
from torch import Tensor

from llmctl.data.batches import Batch, eval_batches
from llmctl.data.packing import cut, pack
from llmctl.data.shards import open_shards
from llmctl.kernels.quantized import Quantized
from llmctl.model import Leaf, LlmctlForCausalLM, leaves
from llmctl.model.open import open_folded
from llmctl.quantize.absmax import absmax
from llmctl.quantize.calibrate import output_error
from llmctl.quantize.gptq import Gptq, gptq
from llmctl.quantize.scales import codes_of
from llmctl.stages.text import TextRows, encoder_of, pad_id_of
from llmctl.talk import SILENT
from llmctl.tokenizer.load import load_tokenizer

CELLS: list[tuple[int, int | None]] = [(4, 128), (4, None), (3, 128), (3, None)]


@dataclass(frozen=True)
class Layer:
    """A leaf, with X^T X of calibration and held-out text, float32 [I, I]."""

    leaf: Leaf
    weight: Tensor
    seen: Tensor
    held_out: Tensor

    @property
    def kind(self) -> str:
        """The last word of its name, such as `q_proj`."""
        return self.leaf.name.rpartition(".")[2]


def nearest(layer: Layer, settings: Gptq) -> Quantized:
    """Round to nearest."""
    return absmax(layer.weight, settings.bits, settings.group)


def scales(layer: Layer, settings: Gptq) -> Quantized:
    """Round to nearest at GPTQ's scales."""
    found = ordered(layer, settings)
    groups = layer.weight.unflatten(1, (-1, found.group))
    codes = codes_of(groups, found.scale[..., None], 0.0, settings.bits)
    return replace(found, codes=codes.flatten(1).to(torch.int8))


def plain(layer: Layer, settings: Gptq) -> Quantized:
    """GPTQ in the order of the columns."""
    return gptq(layer.weight, layer.seen, replace(settings, act_order=False))


def ordered(layer: Layer, settings: Gptq) -> Quantized:
    """GPTQ by the size of the inputs."""
    return gptq(layer.weight, layer.seen, settings)


SIDES: dict[str, Callable[[Layer, Gptq], Quantized]] = {
    "nearest": nearest,
    "scales": scales,
    "gptq": plain,
    "ordered": ordered,
}


@torch.no_grad()
def hessians(model: LlmctlForCausalLM, batches: Iterable[Batch]) -> tuple[dict[str, Tensor], int]:
    """X^T X of every leaf but the head in the model as it is, and the tokens that were read."""
    found: dict[str, Tensor] = {}
    real, tokens = torch.empty(0), 0

    def add(name: str, x: Tensor) -> None:
        x_NI = x[real].float()
        found[name] = found.get(name, 0) + x_NI.T @ x_NI

    hooks = [
        leaf.module.register_forward_pre_hook(lambda _, inputs, name=leaf.name: add(name, inputs[0]))
        for leaf in leaves(model)
        if leaf.kind == "linear"
    ]
    for batch in batches:
        real = batch["attention_mask"] == 1
        tokens += int(real.sum())
        model.model(batch["input_ids"], position_ids=batch["position_ids"])
    for hook in hooks:
        hook.remove()
    return found, tokens


def table(layers: list[Layer], bits: int, group: int | None) -> dict[str, dict[str, float]]:
    """Kind of layer, or `all` -> side -> mean relative error."""
    settings = Gptq(bits, group)
    each: dict[str, list[dict[str, float]]] = defaultdict(list)
    for layer in layers:
        if layer.leaf.shape[1] % (group or 1) == 0:
            errors = {
                name: output_error(layer.weight, side(layer, settings).dequantize(), layer.held_out)
                for name, side in SIDES.items()
            }
            each[layer.kind].append(errors)
            each["all"].append(errors)
    means = {
        kind: {name: sum(errors[name] for errors in rows) / len(rows) for name in SIDES}
        for kind, rows in each.items()
    }
    return {kind: means[kind] for kind in sorted(means, key=lambda kind: kind == "all")}


def show(found: dict[str, dict[str, float]]) -> None:
    """One line a kind of layer."""
    print("".join(f"{name:>12}" for name in ["layers", *SIDES, "of nearest"]))
    for kind, errors in found.items():
        figures = "".join(f"{errors[name]:12.6f}" for name in SIDES)
        print(f"{kind:>12}{figures}{errors['ordered'] / errors['nearest']:12.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a language model")
    parser.add_argument("calibration", help="text to calibrate on")
    parser.add_argument("held_out", help="other text, to measure on")
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens (default 32768)")
    parser.add_argument("--measured", type=int, default=16_384, help="held-out tokens (default 16384)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model, tokenizer = open_folded(asked.model, torch.float32).eval(), load_tokenizer(asked.model)
    length = min(model.config.max_position_embeddings, 2048)

    def read(source: str, tokens: int) -> tuple[dict[str, Tensor], int]:
        shards = open_shards([source], "text", encoder_of(tokenizer), "~/.cache/llmctl", SILENT)
        pieces = cut(shards.doc_start, length, "split", shards.where)
        rows = TextRows(shards, pieces, pack(pieces.length, length), length)
        count = max(1, tokens // length)
        pad = pad_id_of(tokenizer)
        return hessians(model, eval_batches(rows.laid, batch_size=8, pad_id=pad, max_rows=count))

    seen, calibrated = read(asked.calibration, asked.tokens)
    held_out, measured = read(asked.held_out, asked.measured)
    layers = [
        Layer(leaf, leaf.module.weight.detach(), seen[leaf.name], held_out[leaf.name])
        for leaf in leaves(model)
        if leaf.kind == "linear"
    ]
    print(f"{calibrated:,} tokens to calibrate on, {measured:,} held out, {len(layers)} layers")
    results = {}
    for bits, group in CELLS:
        name = f"{bits} bits, " + (f"groups of {group}" if group else "per channel")
        print(name)
        results[name] = table(layers, bits, group)
        show(results[name])
    report({"calibrated": calibrated, "measured": measured, "error": results})


if __name__ == "__main__":
    main()
