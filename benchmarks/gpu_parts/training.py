"""Compiled training steps, checkpoints and resumed runs on the device."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpu_parts.measure import apart, within
from gpu_parts.models import TINY, packed_batches, random_ids, random_llama
from gpu_parts.report import Report, Row
from gpu_parts.steps import our_step
from llmctl.data.batches import Batches
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM, compile_blocks
from llmctl.model.checkpoint import load_model, load_weights, save_model
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import TrainSection
from llmctl.talk import SILENT
from llmctl.train.loop import Job, train
from llmctl.train.losses import LOSSES

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1408,
    "max_position_embeddings": 512,
}
STEPS = 6
COMPILED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
NOISE = 10  # a resumed run may differ from a straight one by as many times as two straight ones do
LEAST_NOISE = 1e-6


def run(report: Report) -> None:
    """Checkpoints and resumed runs."""
    report.case("checkpoint read back, largest difference of a logit", lambda: round_trip(report))
    for dtype in (torch.float32, torch.bfloat16):
        name = f"resumed run, weights, {str(dtype).removeprefix('torch.')}"
        report.case(name, partial(resumed, report, dtype), seconds=5)


def run_compiled(report: Report) -> None:
    """`train.torch_compile=true`."""
    for dtype, bound in COMPILED.items():
        name = str(dtype).removeprefix("torch.")
        report.case(f"losses of {STEPS} compiled steps, {name}", partial(compiled, report, dtype, bound), 10)
    report.case("graph breaks in blocks", graph_breaks)


def _spec(report: Report) -> ModelSection:
    return ModelSection.model_validate(report.size(SIZES, TINY)).resolved()


def _rows(report: Report) -> Batches:
    """Packed rows, all of one length."""
    return packed_batches(
        _spec(report), report.size(8, 2), report.size(512, 32), STEPS, median=report.size(150, 10)
    )


def compiled(report: Report, dtype: torch.dtype, bound: float) -> Row:
    """The losses of steps on packed rows, compiled and not, from the same weights."""
    model, data = random_llama(_spec(report), report.device), _rows(report)
    plain, other = model, copy.deepcopy(model)
    compile_blocks(other)
    began = time.perf_counter()
    found = _losses(other, data, Compute(report.device, dtype))
    seconds = time.perf_counter() - began
    wanted = _losses(plain, data, Compute(report.device, dtype))
    return within(apart(found, wanted), bound, note=f"compiled and trained in {seconds:.1f} s")


def _losses(model: LlmctlForCausalLM, data: Batches, compute: Compute) -> Tensor:
    step = our_step(model, compute)
    return torch.stack([step(data.step(index)[0]) for index in range(STEPS)])


def graph_breaks() -> Row:
    """Of all that this process has compiled so far."""
    from torch._dynamo.utils import counters  # takes a second, which the other part need not wait for

    reasons = "; ".join(list(counters["graph_break"])[:2])
    graphs = counters["stats"].get("unique_graphs", 0)
    note = f"{graphs} graphs{': ' + reasons if reasons else ''}"
    return within(sum(counters["graph_break"].values()), 0, note=note)


@torch.no_grad()
def round_trip(report: Report) -> Row:
    model = random_llama(_spec(report), report.device).eval()
    ids = random_ids(model.config.spec, 2, report.size(256, 24)).to(report.device)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        again = load_model(folder, device=report.device)
        return within(float((model(ids).logits - again(ids).logits).abs().max()), 0.0)


class PowerCut(RuntimeError):
    """Ends a run in the middle."""


class CutOff:
    """Batches that end with a power cut before a step."""

    def __init__(self, data: Batches, before: int) -> None:
        self.steps_per_epoch, self._data, self._before = data.steps_per_epoch, data, before

    def step(self, index: int) -> list[dict[str, Tensor]]:
        if index == self._before:
            raise PowerCut
        return self._data.step(index)


def resumed(report: Report, dtype: torch.dtype) -> Row:
    """A run that was cut off and resumed against one that was not, by the loop of `llmctl pretrain`.

    Kernels that add atomically give no two runs the same last bits, so the bound is how far two straight runs differ.
    """
    start, data = random_llama(_spec(report), report.device), _rows(report)
    with tempfile.TemporaryDirectory() as folder:

        def weights(name: str, batches: Batches | CutOff, expected: type[Exception] | None = None) -> Tensor:
            model = copy.deepcopy(start)
            _train(model, batches, Path(folder) / name, Compute(report.device, dtype), expected)
            return torch.cat([weight.detach().flatten() for weight in model.parameters()])

        straight, again = weights("straight", data), weights("again", data)
        weights("cut", CutOff(data, STEPS // 2), PowerCut)
        found = weights("cut", data)
    noise = apart(again, straight)
    bound = max(NOISE * noise, LEAST_NOISE)
    return within(apart(found, straight), bound, note=f"two straight runs: {noise:.1e}")


def _train(
    model: LlmctlForCausalLM,
    batches: Batches | CutOff,
    folder: Path,
    compute: Compute,
    expected: type[Exception] | None,
) -> None:
    folder.mkdir(exist_ok=True)
    load: Callable[[Path], None] = partial(load_weights, model)
    settings = TrainSection(max_steps=STEPS, save_steps=1, logging_steps=1, threads=torch.get_num_threads())
    job = Job(
        model, batches, LOSSES["causal_lm"], settings, compute, folder, partial(save_model, model), load
    )
    try:
        train(job, SILENT)
    except PowerCut:
        if expected is None:
            raise
