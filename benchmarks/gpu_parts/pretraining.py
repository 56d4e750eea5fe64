"""Pretraining: tokens/s and FLOP/s beside a plain loop over transformers' Llama of the same shape, in turn.

bfloat16 autocast over float32 weights, fused AdamW, clipping. The plain loop takes its loss from all logits, as
`LlamaForCausalLM` does. A figure is the median over rounds of `STEPS` steps each. `packed` rows hold several documents,
which llmctl keeps apart; the others are one document each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from timing import interleaved

from gpu_parts.measure import rate
from gpu_parts.models import (
    packed_batches,
    random_ids,
    random_llama,
    shape,
    training_flops,
    transformers_twin,
)
from gpu_parts.report import Report, Row
from gpu_parts.steps import Batch, Step, our_step, plain_step
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM, compile_blocks
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import TrainSection
from llmctl.talk import SILENT
from llmctl.train.loop import Job, train
from llmctl.train.losses import LOSSES

STEPS = 5  # of a round
ROUNDS = 4
LENGTH = 1024
LOOP_STEPS = 12  # of the run with the whole loop


def run_124m(report: Report) -> None:
    _run(report, "124M", rows=32)


def run_350m(report: Report) -> None:
    _run(report, "350M", rows=16)


def _run(report: Report, size: str, rows: int) -> None:
    job = _Size(report, size, report.size(rows, 2))
    report.case(f"{size}, parameters", job.parameters)
    sides: dict[str, Step] = {}
    report.case(f"{size}, transformers", partial(job.alone, sides, "transformers"))
    report.case(f"{size}, llmctl", partial(job.beside, sides, "llmctl", "transformers"))
    report.case(f"{size}, llmctl packed", partial(job.beside, sides, "llmctl packed", "llmctl"))
    # what compiles comes last, and what matters most of it first
    for name, other in (
        ("llmctl compiled", "transformers"),
        ("llmctl compiled packed", "llmctl compiled"),
        ("transformers compiled", "llmctl compiled"),
    ):
        report.case(f"{size}, {name}", partial(job.beside, sides, name, other), report.size(25, 5))
    sides.clear()
    report.case(f"{size}, the whole loop, compiled, packed", job.whole_loop, report.size(20, 5))


class _Size:
    """One shape of model, and the ways to train it."""

    def __init__(self, report: Report, size: str, rows: int) -> None:
        self.report, self.rows = report, rows
        self.spec: ModelSection = shape(size, report.tiny)
        self.length = report.size(LENGTH, 32)
        self.compute = Compute(report.device, torch.bfloat16)
        ids = random_ids(self.spec, rows, self.length)
        self.whole: Batch = {"input_ids": ids, "labels": ids}
        self.documents = packed_batches(self.spec, rows, self.length, 2, report.size(350, 12)).step(0)[0]
        # side -> how its step is made, and what it trains on
        self.ways: Mapping[str, tuple[Callable[[], Step], Batch]] = {
            "llmctl": (self._ours, self.whole),
            "llmctl packed": (self._ours, self.documents),
            "llmctl compiled": (partial(self._ours, True), self.whole),
            "llmctl compiled packed": (partial(self._ours, True), self.documents),
            "transformers": (self._theirs, self.whole),
            "transformers compiled": (partial(self._theirs, True), self.whole),
        }

    def parameters(self) -> Row:
        count = sum(weight.numel() for weight in self._model().parameters())
        flops = training_flops(self.spec, self.length)
        return {
            "value": count,
            "note": f"{flops / 1e9:.3f} GFLOP a token; {self.rows} rows of {self.length} tokens",
        }

    def alone(self, sides: dict[str, Step], name: str) -> Row:
        """The speed of one side by itself, for want of another yet."""
        sides[name] = self._ready(name)
        return self._figures(self._speeds({name: sides[name]}), name, None)

    def beside(self, sides: dict[str, Step], name: str, other: str) -> Row:
        """The speeds of two sides in turn; of one alone where the other could not be made."""
        sides[name] = self._ready(name)
        known = other if other in sides else None
        chosen = {each: sides[each] for each in (name, known) if each}
        return self._figures(self._speeds(chosen), name, known)

    def whole_loop(self) -> Row:
        """`train` of train/loop.py, with its data, its metrics and the checkpoint at the end, which is not counted."""
        model = self._model()
        compile_blocks(model)
        steps = self.report.size(LOOP_STEPS, 2)
        data = packed_batches(self.spec, self.rows, self.length, 2 * steps, self.report.size(350, 12))
        speeds = []
        for _ in range(2):  # the first compiles
            settings = TrainSection(
                max_steps=steps, save_steps=10**6, logging_steps=4, threads=torch.get_num_threads()
            )
            with tempfile.TemporaryDirectory() as folder:
                job = Job(
                    model, data, LOSSES["causal_lm"], settings, self.compute, Path(folder), _nothing, _nothing
                )
                speeds.append(train(job, SILENT)["tokens_per_second"])
        return {"value": speeds[-1], "unit": "tokens/s", "note": "trained tokens"}

    def _ready(self, name: str) -> Step:
        """A step that was taken twice: it has compiled and allocated."""
        make, batch = self.ways[name]
        step = make()
        for _ in range(2):
            step(batch)
        self.report.synchronize()
        return step

    def _speeds(self, sides: Mapping[str, Step]) -> dict[str, list[float]]:
        """Tokens per second, round by round."""

        def timed(name: str, step: Step) -> Callable[[], float]:
            def round_of_steps() -> float:
                batch, steps = self.ways[name][1], self.report.size(STEPS, 1)
                began = time.perf_counter()
                for _ in range(steps):
                    step(batch)
                self.report.synchronize()
                return steps * batch["input_ids"].numel() / (time.perf_counter() - began)

            return round_of_steps

        return interleaved({n: timed(n, step) for n, step in sides.items()}, self.report.size(ROUNDS, 1))

    def _figures(self, speeds: Mapping[str, list[float]], name: str, other: str | None) -> Row:
        row = rate(speeds, name, other, "tokens/s")
        if "packed" not in name:  # documents attend to less, by how much depends on their lengths
            row["flops"] = statistics.median(speeds[name]) * training_flops(self.spec, self.length)
        if self.report.device.type == "cuda":
            row["note"] = f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB with what it ran beside"
            torch.cuda.reset_peak_memory_stats()
        return row

    def _model(self) -> LlmctlForCausalLM:
        return random_llama(self.spec, self.report.device)

    def _ours(self, compiled: bool = False) -> Step:
        model = self._model()
        if compiled:
            compile_blocks(model)
        return our_step(model, self.compute)

    def _theirs(self, compiled: bool = False) -> Step:
        twin = transformers_twin(self._model().train())
        return plain_step(torch.compile(twin) if compiled else twin, self.compute)


def _nothing(folder: Path) -> None:
    """Saves and loads no model."""
