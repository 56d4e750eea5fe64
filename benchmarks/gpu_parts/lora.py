"""LoRA: a step of ours beside PEFT on transformers' Llama, and what the adapter computes against the CPU."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from timing import interleaved
from torch import Tensor, nn

from gpu_parts.measure import apart, furthest, rate, within
from gpu_parts.models import TINY, random_ids, random_llama, shape, transformers_twin
from gpu_parts.report import Report, Row
from gpu_parts.steps import Step, our_step, plain_step
from llmctl.kernels.device import Compute
from llmctl.model.adapters import add_lora, fold, narrow_frozen
from llmctl.recipe.model import ModelSection

R, ALPHA = 16, 32.0
SMALL = TINY | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1024}
STEPS, ROUNDS = 5, 4


def run(report: Report) -> None:
    report.case("adapter gradients, float32, against the CPU", lambda: gradients(report))
    report.case("folded weights against the adapter, logits", lambda: folded(report))
    report.case("350M, r = 16 on all layers", lambda: speed(report), seconds=10)


def _adapted(report: Report) -> tuple[nn.Module, Tensor]:
    """A small model on the CPU whose adapter is not zero, and ids."""
    spec = ModelSection.model_validate(report.size(SMALL, TINY)).resolved()
    model = add_lora(
        random_llama(spec, torch.device("cpu")), r=4, alpha=8.0, dropout=0.0, target_modules="all-linear"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0.0, 0.05, generator=generator)
    return model, random_ids(spec, 2, report.size(100, 24))


def gradients(report: Report) -> Row:
    model, ids = _adapted(report)
    here = copy.deepcopy(model).to(report.device)

    def of(each: nn.Module, x: Tensor) -> list[Tensor]:
        loss = each.train()(input_ids=x, labels=x, skip_logits=True, use_cache=False).loss
        return list(torch.autograd.grad(loss, [w for w in each.parameters() if w.requires_grad]))

    return within(furthest(of(here, ids.to(report.device)), of(model, ids)), 1e-3)


@torch.no_grad()
def folded(report: Report) -> Row:
    model, ids = _adapted(report)
    here, ids = model.to(report.device).eval(), ids.to(report.device)
    before = here(input_ids=ids).logits
    return within(apart(fold(here)(input_ids=ids).logits, before), 1e-4)


def speed(report: Report) -> Row:
    """Both bases in bfloat16, both adapters in float32, under autocast."""
    spec, compute = shape("350M", report.tiny), Compute(report.device, torch.bfloat16)
    ids = random_ids(spec, report.size(16, 2), report.size(1024, 24))
    batch = {"input_ids": ids, "labels": ids}
    theirs = get_peft_model(
        transformers_twin(random_llama(spec, report.device, torch.bfloat16)),
        LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    ours = add_lora(
        random_llama(spec, report.device), r=R, alpha=ALPHA, dropout=0.0, target_modules="all-linear"
    )
    narrow_frozen(ours.get_base_model(), torch.bfloat16)
    steps: dict[str, Step] = {
        "llmctl": our_step(ours, compute),
        "PEFT on transformers": plain_step(theirs, compute),
    }
    first = float(steps["llmctl"](batch))
    steps["PEFT on transformers"](batch)
    count = report.size(STEPS, 1)

    def timed(step: Step) -> Callable[[], float]:
        def round_of_steps() -> float:
            began = time.perf_counter()
            for _ in range(count):
                step(batch)
            report.synchronize()
            return count * ids.numel() / (time.perf_counter() - began)

        return round_of_steps

    speeds = interleaved({name: timed(step) for name, step in steps.items()}, report.size(ROUNDS, 1))
    last = float(steps["llmctl"](batch))
    row = rate(speeds, "llmctl", "PEFT on transformers", "tokens/s")
    return row | {"note": f"the loss fell from {first:.3f} to {last:.3f}", **within(last / first, 1.0)}
