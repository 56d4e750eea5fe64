"""Quantized weights on the device: the path that multiplies them exactly, GPTQ, NF4."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpu_parts.measure import apart, within
from gpu_parts.models import TINY, random_ids, random_llama
from gpu_parts.report import Report, Row
from llmctl.kernels.device import Compute
from llmctl.kernels.products import PRODUCTS, path_of
from llmctl.kernels.quantized import Quantized
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.checkpoint import load_model, save_quantized
from llmctl.model.compressed import Scheme
from llmctl.model.nf4 import quantize_nf4, round_nf4
from llmctl.quantize.absmax import absmax
from llmctl.quantize.gptq import Gptq, gptq
from llmctl.recipe.model import ModelSection

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1408,
    "max_position_embeddings": 512,
}
WAYS = {
    "int8": (8, None),
    "int8, groups of 32": (8, 32),
    "int4, groups of 32": (4, 32),
    "int3, groups of 32": (3, 32),
}
FLOAT32, BFLOAT16 = 1e-4, 2e-2
GPTQ_WORSE = 1.02  # output error on the device over that on the CPU: sums round otherwise, a few codes change
NF4_BFLOAT16 = 0.05


def run(report: Report) -> None:
    for name, (bits, group) in WAYS.items():
        report.case(f"product, {name}, against the CPU", partial(product, report, bits, group))
        report.case(f"fast path, {name}, against the weights written out", partial(fast, report, bits, group))
    for name in ("int8", "int4, groups of 32", "int3, groups of 32"):
        report.case(f"folder in {name}, logits against the CPU", partial(folder, report, *WAYS[name]))
    report.case("GPTQ, output error over that on the CPU", lambda: gptq_error(report))
    report.case("NF4, logits against weights rounded to NF4", lambda: nf4(report))


def _matrix(report: Report, bits: int, group: int | None) -> tuple[Quantized, Tensor]:
    """A quantized matrix and inputs for it, on the CPU."""
    outputs, inputs = report.size((2048, 1024), (32, 64))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    return absmax(weight, bits, group), torch.randn(64, inputs, generator=generator)


def product(report: Report, bits: int, group: int | None) -> Row:
    """`exact` on both devices."""
    matrix, x = _matrix(report, bits, group)
    wanted = PRODUCTS["exact"](matrix, torch.device("cpu"))(x)
    found = PRODUCTS["exact"](matrix, report.device)(x.to(report.device))
    return within(apart(found, wanted), FLOAT32)


def fast(report: Report, bits: int, group: int | None) -> Row:
    """The path that is chosen here, in bfloat16."""
    matrix, x = _matrix(report, bits, group)
    path = path_of(matrix, report.device)
    found = PRODUCTS[path](matrix, report.device)(x.to(report.device, torch.bfloat16))
    return within(apart(found, x @ matrix.dequantize().T), BFLOAT16, note=f"path: {path}")


@torch.no_grad()
def folder(report: Report, bits: int, group: int | None) -> Row:
    """A quantized checkpoint, written once and opened on both devices."""
    spec = ModelSection.model_validate(report.size(SIZES, TINY)).resolved()
    model = random_llama(spec, torch.device("cpu")).eval()
    matrices = {
        leaf.name: absmax(leaf.module.weight.detach(), bits, group)
        for leaf in leaves(model)
        if leaf.kind == "linear"
    }
    ids = random_ids(spec, 1, report.size(128, 24))
    with tempfile.TemporaryDirectory() as where:
        save_quantized(model, matrices, Scheme(bits, group, True), Path(where))
        wanted = load_model(where, quantized="exact")(ids).logits
        here = load_model(where, device=report.device, quantized="exact")
        return within(apart(here(ids.to(report.device)).logits, wanted), FLOAT32)


def gptq_error(report: Report) -> Row:
    """4 bits in groups of 64, from correlated inputs."""
    outputs, inputs = report.size((1024, 1024), (32, 64))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    hessian, how = x.T @ x / len(x), Gptq(bits=4, group=64)

    def error(device: torch.device) -> float:
        found = gptq(weight.to(device), hessian.to(device), how).dequantize().cpu()
        return apart(x @ found.T, x @ weight.T)

    here, there = error(report.device), error(torch.device("cpu"))
    return within(here / there, GPTQ_WORSE, note=f"{here:.2e} and {there:.2e}")


def nf4(report: Report) -> Row:
    """Packed layers that multiply in bfloat16 against ordinary ones of the same rounded weights; a gradient passes."""
    import bitsandbytes  # noqa: F401  (its absence skips the case)

    spec = ModelSection.model_validate(report.size(SIZES, TINY)).resolved()
    model = random_llama(spec, report.device)
    packed: LlmctlForCausalLM = copy.deepcopy(model)
    round_nf4(model)
    quantize_nf4(packed, torch.bfloat16)
    ids = random_ids(spec, 1, report.size(128, 24)).to(report.device)
    with torch.no_grad():
        wanted = model(ids).logits
    with Compute(report.device, torch.bfloat16).autocast():
        out = packed(ids, labels=ids)
    out.loss.backward()
    gradient = packed.model.embed_tokens.weight.grad
    assert gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    return within(apart(out.logits, wanted), NF4_BFLOAT16)
