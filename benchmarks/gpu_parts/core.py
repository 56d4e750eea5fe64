"""The core on the device against the core on the CPU, and against transformers' Llama."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from gpu_parts.measure import apart, furthest, within
from gpu_parts.models import TINY, random_ids, random_llama, transformers_twin
from gpu_parts.report import Report, Row
from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM
from llmctl.recipe.model import ModelSection

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1376,
    "max_position_embeddings": 1024,
}
FLOAT32 = 1e-4  # sums in another order, in as many bits
GRADIENT = 1e-3
NO_WORSE = 1.5  # times the rounding error of transformers in bfloat16


def run(report: Report) -> None:
    spec = ModelSection.model_validate(report.size(SIZES, TINY)).resolved()
    model = random_llama(spec, torch.device("cpu")).eval()
    here = copy.deepcopy(model).to(report.device)
    ids = random_ids(spec, 2, report.size(512, 24))
    with torch.no_grad():
        exact = model(ids).logits
        report.case("logits, float32, against the CPU", lambda: float32_logits(here, ids, exact))
        report.case("logits, float32, against transformers", lambda: same_logits(here, ids))
        report.case(
            "logits, bfloat16, error over that of transformers",
            lambda: bfloat16_logits(here, ids, exact),
        )
    report.case("gradients, float32, against the CPU", lambda: gradients(model, here, ids))
    report.case("gradients, bfloat16 autocast", lambda: autocast_gradients(model, here, ids))
    for way in ("document by document", "under a mask"):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"packed rows, {way}, {str(dtype).removeprefix('torch.')}"
            report.case(name, partial(packed, here, ids, way, dtype))
    report.case("decoding over a cache", lambda: cached(here, ids, exact))
    report.case("32 greedy tokens, those that differ from the CPU's", lambda: greedy(model, here, ids))


def float32_logits(model: LlmctlForCausalLM, ids: Tensor, exact: Tensor) -> Row:
    return within(apart(model(ids.to(model.device)).logits, exact), FLOAT32)


def same_logits(model: LlmctlForCausalLM, ids: Tensor) -> Row:
    ids = ids.to(model.device)
    return within(apart(model(ids).logits, transformers_twin(model)(ids).logits), FLOAT32)


def bfloat16_logits(model: LlmctlForCausalLM, ids: Tensor, exact: Tensor) -> Row:
    """Both are rounded; neither should lose more than the other."""
    narrow, ids = copy.deepcopy(model).bfloat16(), ids.to(model.device)
    ours = apart(narrow(ids).logits.float(), exact)
    theirs = apart(transformers_twin(narrow)(ids).logits.float(), exact)
    return within(ours / theirs, NO_WORSE, note=f"ours {ours:.2e}, transformers {theirs:.2e}")


def gradients(model: LlmctlForCausalLM, here: LlmctlForCausalLM, ids: Tensor) -> Row:
    return within(furthest(_gradients(here, ids), _gradients(model, ids)), GRADIENT)


def autocast_gradients(model: LlmctlForCausalLM, here: LlmctlForCausalLM, ids: Tensor) -> Row:
    with Compute(here.device, torch.bfloat16).autocast():
        found = _gradients(here, ids)
    return within(
        furthest(found, _gradients(model, ids)), 0.1, note="rounding to 8 bits alone is 0.01 to 0.05"
    )


def _gradients(model: LlmctlForCausalLM, ids: Tensor) -> list[Tensor]:
    """Of the loss as training takes it: in slices, without all logits."""
    ids = ids.to(model.device)
    loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
    return list(torch.autograd.grad(loss, list(model.parameters())))


@torch.no_grad()
def packed(model: LlmctlForCausalLM, ids: Tensor, way: str, dtype: torch.dtype) -> Row:
    """Documents that share a row against the same ones by themselves."""
    model, ids = copy.deepcopy(model).to(dtype), ids.to(model.device)
    model.model.attends_by_span = way == "document by document"
    length = ids.shape[1]
    lengths = [length // 3, 1, length // 2]
    lengths.append(length - sum(lengths))
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None].expand(len(ids), -1)
    together = model(ids, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], 1)
    return within(apart(together, alone), FLOAT32 if dtype == torch.float32 else 0.02)


@torch.no_grad()
def cached(model: LlmctlForCausalLM, ids: Tensor, exact: Tensor) -> Row:
    """In pieces over a cache, some of one token, against all at once on the CPU."""
    ids, cache, parts, at = ids.to(model.device), None, [], 0
    for count in (7, 1, 1, 4, 1, ids.shape[1] - 14):
        out = model(ids[:, at : at + count], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + count
        parts.append(out.logits)
    return within(apart(torch.cat(parts, 1), exact), FLOAT32)


def greedy(model: LlmctlForCausalLM, here: LlmctlForCausalLM, ids: Tensor) -> Row:
    prompt = ids[0, :16].tolist()
    found, wanted = (list(generate(each, prompt, 32, likeliest)) for each in (here, model))
    return within(sum(a != b for a, b in zip(found, wanted, strict=True)), 0)
