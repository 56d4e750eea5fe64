"""Every entry of every table of the model, on the device against the CPU.

`tests/model/variants.py` lists them: small models, each forward and backward. Layers of every kind run once more at a
length at which their fast paths are taken.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.measure import furthest, within
from gpu_parts.report import Report, Row
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM
from llmctl.model.paths import mixing_paths
from tests.model.variants import CROSSED, LAYERS, MIXTURES, MLA, SINGLE, ids, make

LOGITS, GRADIENTS = 1e-4, 1e-3
NARROW_LOSS = 0.05  # relative, of the loss under bfloat16 autocast
# sizes with which a row of LENGTH tokens takes the fast path of its pattern
LENGTH = 1024
LARGE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": LENGTH,
}
SCALED: dict[str, dict[str, Any]] = {
    "sliding": {"sliding_window": 96},
    "band": {"sliding_window": 96},
    "dilated": {"sliding_window": 24, "dilation": 4},
    "global": {"num_global_tokens": 16},
    "random": {"num_random_blocks": 2, "block_size": 32},
    "block": {"block_size": 64},
    "routing": {"routing": {"num_clusters": 8, "chunk_size": 64}},
    "lsh": {"lsh": {"num_buckets": 16, "num_hashes": 2, "chunk_size": 32}},
    "mamba2": {"ssm": {"state_size": 32, "head_dim": 32, "chunk_size": 128}},
    "longformer": {"sliding_window": 96, "num_global_tokens": 8},
    "bigbird": {"sliding_window": 64, "num_global_tokens": 32, "num_random_blocks": 2, "block_size": 32},
    "tiled": {"sliding_window": 96},
    "attention-and-state": {"ssm": {"state_size": 32, "head_dim": 32, "chunk_size": 128}},
    "content-and-local": {"sliding_window": 96, "routing": {"num_clusters": 8, "chunk_size": 64}},
    "mla": {
        "mla": {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64},
    },
}
BY_CONTENT = ("routing", "lsh", "content-and-local")
FEW = 8  # variants of a dry run


def run(report: Report) -> None:
    layers = LAYERS | MIXTURES | {"mla": MLA}
    for name, variant in layers.items():
        report.case(f"{name}, {LENGTH} tokens", partial(long_row, report, name, variant))
    _all(report, "one variant for each entry of the tables", SINGLE, backward=True)
    _all(report, "mixers crossed with positions and experts", CROSSED, backward=False)


def _all(report: Report, title: str, variants: Mapping[str, Any], backward: bool) -> None:
    """A row for each variant, which the table shows only if it failed, and one for all of them."""
    worst, counts = {"difference": 0.0, "bound": LOGITS, "note": ""}, Counter[str]()

    def one(name: str, variant: Any) -> Row:
        row = small_model(report, variant, backward)
        counts["held" if row["difference"] <= row["bound"] else "failed"] += 1
        if not row["difference"] <= worst["difference"]:
            worst.update(difference=row["difference"], note=f"the furthest is {name}")
        return row | {"detail": True}

    chosen = list(variants.items())[:: report.size(1, 1 + len(variants) // FEW)]
    for name, variant in chosen:
        if report.left() < 1:
            break
        counts["tried"] += 1
        report.case(f"{name}{'' if backward else ', forward'}", partial(one, name, variant))
    report.row(title, value=f"{counts['held']} of {counts['tried']} tried, {len(chosen)} in all", **worst)


def small_model(report: Report, variant: Any, backward: bool) -> Row:
    """Logits, and the gradients of the loss, in float32; then the loss in bfloat16."""
    model = make(variant)
    here = copy.deepcopy(model).to(report.device)
    wanted, found = _pass(model, ids(), backward), _pass(here, ids(), backward)
    difference = furthest(found[:1], wanted[:1])
    if backward:
        difference = max(difference, furthest(found[1:], wanted[1:]) * LOGITS / GRADIENTS)
        with Compute(report.device, torch.bfloat16).autocast():
            x = ids().to(report.device)
            loss = here(x, labels=x, skip_logits=True, use_cache=False).loss
        loss.backward()
        difference = max(difference, furthest([loss], [wanted[1]]) * LOGITS / NARROW_LOSS)
    return within(difference, LOGITS)


def long_row(report: Report, name: str, variant: Any) -> Row:
    """A pattern at a length at which its fast path is worth it, forward and backward."""
    sized = variant if report.tiny else variant | LARGE | SCALED.get(name, {})
    model = make(sized)
    here = copy.deepcopy(model).to(report.device)
    length = report.size(LENGTH, 64)
    paths = " and ".join(mixing_paths(here.model, length))
    x = ids(1, length)
    wanted, found = _pass(model, x, True), _pass(here, x, True)
    difference = max(furthest(found[:1], wanted[:1]), furthest(found[1:], wanted[1:]) * LOGITS / GRADIENTS)
    if name in BY_CONTENT:
        paths += "; a token between two buckets may change sides"
    return within(difference, LOGITS, note=paths)


def _pass(model: LlmctlForCausalLM, x: Tensor, backward: bool) -> list[Tensor]:
    """Logits; with `backward` the loss, and the gradient of every weight that has one."""
    x = x.to(model.device)
    if not backward:
        with torch.no_grad():
            return [model(x).logits]
    out = model(x, labels=x)
    weights = list(model.parameters())
    grads = torch.autograd.grad(out.loss, weights, allow_unused=True)
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
    # one norm for all: a weight whose gradient is next to nothing has rounding errors of its own size
    return [out.logits.detach(), out.loss.detach(), torch.cat([g.flatten() for g in filled])]
