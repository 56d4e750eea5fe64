"""Claim: where another program keeps one of two cores busy, `threads: auto` is at least 0.7 times as fast as a single thread.

The single thread has both cores to itself. Every figure comes from a process of its own, started as `llmctl` starts,
and is of the work alone, without loading:

    chat    tokens/s of one greedy answer, after its first token
    sft     tokens/s of a few steps of LoRA on one row of 128 tokens
    eval    tokens/s of scoring rows of 256 tokens

in four ways, in turn:

    alone   one thread, no other program
    auto    `threads: auto` beside a program that never stops computing
    fixed   two threads beside it
    spins   two threads beside it that wait as OpenMP does by itself

All processes share the first two processors that this one may use (Linux). What others do on the machine slows the
sides down differently, so its load is printed. Where it is never idle, --nice -15 gives the session of this program, the
busy process included, priority over others while it measures (root, Linux's autogroups).

    python benchmarks/busy.py MODEL --rounds 3
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from timing import interleaved, line, options, ratio, report, summary

PROMPT = "Write a long story about a town by the sea."
ROWS, LENGTH = 4, 256  # of an evaluation
# side -> its threads, whether another program runs, variables of its process
SIDES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "alone": ("1", False, {}),
    "auto": ("auto", True, {}),
    "fixed": ("2", True, {}),
    "spins": ("2", True, {"GOMP_SPINCOUNT": "300000"}),
}
BOUND = 0.7


# --- the work, in a process of its own --------------------------------------------------------------


@contextmanager
def priority(nice: int) -> Iterator[None]:
    """Priority of this session over others; 0 changes nothing."""
    group = Path("/proc/self/autogroup")
    if nice:
        group.write_text(str(nice))
    try:
        yield
    finally:
        if nice:
            group.write_text("0")


class MeasuredTraining:
    """A silent talk that gives the training loop its priority."""

    def __init__(self, nice: int) -> None:
        self.nice = nice

    def say(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Any]:
        """Nothing to see; the bar of the loop lasts as long as the loop."""
        from llmctl.talk import SILENT

        with SILENT.bar(label, total, unit) as bar, priority(self.nice if label == "training" else 0):
            yield bar


def decode(model: str, threads: str, nice: int) -> float:
    """Tokens per second of an answer."""
    from llmctl.recipe.chat import ChatRecipe
    from llmctl.recipe.load import load_recipe
    from llmctl.stages import chat
    from llmctl.talk import SILENT

    words = [
        "chat.temperature=0",
        "chat.max_new_tokens=40",
        "chat.ignore_eos=true",
        f"chat.threads={threads}",
    ]
    recipe = load_recipe(ChatRecipe, None, {"base": model}, words)
    conversation = chat.begin(recipe, SILENT)
    with priority(nice):
        return conversation.ask(PROMPT).tokens_per_second


def tune(model: str, threads: str, nice: int) -> float:
    """Tokens per second of training steps."""
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.tune import SftRecipe
    from llmctl.stages import sft

    words = [f"train.threads={threads}", "train.max_steps=3", "train.per_device_train_batch_size=1"]
    words += [
        "train.logging_steps=3",
        "data.max_length=128",
        "data.eval_fraction=0.0",
        "train.sample_steps=1000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"base": model, "data.train": ["builtin:tinyworld-instructions"], "out": f"{folder}/run"}
        found = sft.run(load_recipe(SftRecipe, None, flags, words), MeasuredTraining(nice))
    return float(found.metrics["tokens_per_second"])


def evaluate(model: str, threads: str, nice: int) -> float:
    """Tokens per second of scoring rows."""
    import torch

    from llmctl.evaluate.perplexity import score
    from llmctl.kernels.device import pick_compute
    from llmctl.kernels.threads import use_threads
    from llmctl.model.open import open_model
    from llmctl.talk import SILENT

    compute = pick_compute("cpu", "float32")
    use_threads("auto" if threads == "auto" else int(threads), "eval.threads", compute.device, SILENT)
    opened = open_model(model, compute.dtype, compute.device)
    ids = torch.randint(0, 1000, (ROWS, 1, LENGTH), generator=torch.Generator().manual_seed(0))
    places = torch.arange(LENGTH)[None]
    batches = [{"input_ids": row, "labels": row, "position_ids": places} for row in ids]
    score(opened, batches[:1], 0.0, compute)
    with priority(nice):
        started = time.perf_counter()
        score(opened, batches, 0.0, compute)
        return ROWS * LENGTH / (time.perf_counter() - started)


WORK = {"chat": decode, "sft": tune, "eval": evaluate}


def worker(work: str, model: str, threads: str, nice: int) -> None:
    """Print the figure of one side."""
    from llmctl.cli.main import bound_spinning, quiet_libraries

    bound_spinning()
    quiet_libraries()
    print(WORK[work](model, threads, nice))


# --- the comparison ---------------------------------------------------------------------------------


@contextmanager
def another_program() -> Iterator[None]:
    """A process that never stops computing."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(work: str, model: str, side: str, nice: int) -> float:
    """The figure of one side. Raises CalledProcessError if its process fails."""
    threads, busy, variables = SIDES[side]
    words = [sys.executable, __file__, model, "--work", work, "--as", threads, "--nice", str(nice)]
    with another_program() if busy else nullcontext():
        ended = subprocess.run(
            words, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True, timeout=900
        )
    return float(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument(
        "model", help="a folder of a model with a chat template, such as SmolLM2-135M-Instruct"
    )
    parser.add_argument("--work", choices=WORK, action="append", help="what is measured; all by default")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--nice", type=int, default=0, help="priority while measuring, -20 to 19 (default 0)")
    parser.add_argument("--as", dest="threads_of_worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads_of_worker:
        worker(given.work[0], str(Path(given.model)), given.threads_of_worker, given.nice)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    os.environ.pop("OMP_NUM_THREADS", None)
    figures: dict[str, Any] = {}
    for work in given.work or WORK:
        sides = {
            side: (lambda work=work, side=side: measure(work, given.model, side, given.nice))
            for side in given.sides
        }
        print(f"{work}, tokens/s")
        found = interleaved(sides, given.rounds, ",.1f")
        for side, values in found.items():
            print(line(f"{work}, {side}", summary(values), unit="tokens/s"))
        ratios = {side: ratio(found[side], found["alone"]) for side in given.sides if side != "alone"}
        for side, one in ratios.items():
            print(line(f"{work}, {side} / alone", one, unit=f"at least {BOUND}" if side == "auto" else ""))
        figures[work] = {"tokens_per_second": {s: summary(v) for s, v in found.items()}, "ratios": ratios}
        print(f"load average {os.getloadavg()[0]:.1f}")
    report({"rounds": given.rounds, "load": os.getloadavg(), **figures})


if __name__ == "__main__":
    main()
