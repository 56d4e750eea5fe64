"""Claim: SFT with packed rows trains at least twice the real tokens per second of TRL's SFTTrainer, in no more memory.

Four ways to teach one model from the same conversations with the same adapter (LoRA r=16, alpha=32 on every linear
layer in the blocks), in turn, several rounds:

    llmctl            the loop of `llmctl sft`: whole conversations packed into rows, none of which sees another
    llmctl, padded    the same with data.packing=false: what is left of the difference without packing
    trl               SFTTrainer with its defaults, which recompute activations
    trl, keeping      the same with gradient_checkpointing=False: more memory, less to compute

The conversations are rendered once, by llmctl, and those longer than the context are cut. Every side takes them in
the same order, and in a step as many of them as on average stand in the packed rows of a step, so that all learn
the same in as many steps; `--padded` sets another number for the padded sides. SFTTrainer gets finished
`input_ids` and `labels`, and its own collator pads them to the longest of the batch. A real token is one that is
not padding, trained or prompt. Embeddings of tokens the base never saw, which `llmctl sft` trains too, stay as
they are here: SFTTrainer fails on them where the head is tied.

Every side is a process of its own that lasts over the rounds; each round begins with a fresh adapter, after two
steps that do not count. Memory is the most that was resident while the steps ran. The precision is what each side
picks by itself: `layers return` is what an adapted layer returned. `loss` is that of the first round, which must be
about the same (llmctl averages it over tokens, SFTTrainer over steps). Needs Linux, and a base whose vocabulary
holds its template's tokens:

    python benchmarks/sft_vs_trl.py --model runs/base --data alpaca.json --steps 16 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Summary, interleaved, options, ratio, report, summary

from llmctl.data.batches import Batches, Laid
from llmctl.data.packing import Rows, unpacked
from llmctl.recipe.tune import LoraSection, SftData, SftTrain
from llmctl.stages.rows import read_rows
from llmctl.stages.tune import Base, prepare_base, tuned
from llmctl.talk import SILENT
from llmctl.train.loop import Job, train
from llmctl.train.losses import LOSSES

GOAL = 2.0
RATE = 2e-4
WARM_UP = 2  # steps before each round
OURS = "llmctl"


@dataclass(frozen=True)
class Setting:
    """What all sides are given.

    Args:
        packed: the conversations in packed rows, in the order they are trained in.
        padded: the same conversations, one a row, in the same order.
        rows: packed rows a step.
        conversations: padded conversations a step.
    """

    model: str
    packed: Laid
    padded: Laid
    rows: int
    conversations: int
    threads: int


@dataclass
class Run:
    """What one run of a side took in and needed. `dtype` is what its first adapted layer returned."""

    seconds: float = 0.0
    real: int = 0
    places: int = 0
    loss: float = 0.0
    dtype: str = ""
    peak: int = 0

    def count(self, real: torch.Tensor) -> None:
        """Take in a batch: True [B, T] where a token is not padding."""
        self.real += int(real.sum())
        self.places += real.numel()

    def watch(self, model: torch.nn.Module) -> None:
        """Note the precision at the first forward pass of an adapted layer."""
        from peft.tuners.lora import LoraLayer

        def note(_: torch.nn.Module, __: Any, out: torch.Tensor) -> None:
            self.dtype = str(out.dtype).removeprefix("torch.")
            hook.remove()

        hook = next(m for m in model.modules() if isinstance(m, LoraLayer)).register_forward_hook(note)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Measure the most that is resident in the block."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        yield
        lines = Path("/proc/self/status").read_text().splitlines()
        self.peak = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


# --- llmctl -----------------------------------------------------------------------------------------


class CountedBatches(Batches):
    """The batches of `llmctl sft`, counted."""

    def __init__(self, run: Run, laid: Laid, rows: int, max_length: int) -> None:
        self.run = run
        # padding is told from the rest by an id that no conversation has
        self.pad = int(np.setdiff1d(np.arange(laid.ids.max() + 1), laid.ids)[0])
        super().__init__(
            laid,
            max_length=max_length,
            batch_size=rows,
            accumulation=1,
            seed=0,
            pad_id=self.pad,
            shuffle=False,
        )

    def step(self, i: int) -> list[dict[str, torch.Tensor]]:
        found = super().step(i)
        for batch in found:
            self.run.count(batch["input_ids"] != self.pad)
        return found


def llmctl_side(given: Setting, steps: int, packing: bool) -> Run:
    base, run = base_of(given.model), Run()
    model = tuned(base, "lora", LoraSection(), 0, False)
    laid, rows = (given.packed, given.rows) if packing else (given.padded, given.conversations)
    batches = CountedBatches(run, laid, rows, base.max_length)
    run.watch(model.model)
    settings = SftTrain(
        max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", warmup_ratio=0.0,
        logging_steps=steps, save_steps=10**6, threads=given.threads,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, run.memory():
        job = Job(
            model.model, batches, LOSSES["causal_lm"], settings, base.compute, Path(folder),
            lambda _: None, lambda _: None,
        )  # fmt: skip
        found = train(job, SILENT)
    run.seconds = found["tokens"] / found["tokens_per_second"]  # of the steps alone
    run.loss = found["loss"]
    return run


def base_of(model: str) -> Base:
    base = prepare_base(model, device="cpu", dtype="auto", template="auto", max_length=None, talk=SILENT)
    return replace(base, unseen=())


# --- trl --------------------------------------------------------------------------------------------


def trl_side(given: Setting, steps: int, recompute: bool) -> Run:
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    run = Run()

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            run.count(inputs["attention_mask"] == 1)
            return super().training_step(model, inputs, *rest)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            run.seconds = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            run.seconds = time.perf_counter() - run.seconds

    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=given.conversations, learning_rate=RATE,
            lr_scheduler_type="constant", adam_beta2=SftTrain().adam_beta2, gradient_checkpointing=recompute,
            dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, use_cpu=True, report_to=[],
            train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Counted(
            given.model,
            arguments,
            train_dataset=finished(given.padded),
            peft_config=adapter,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        run.watch(trainer.model)
        with run.memory():
            run.loss = trainer.train().training_loss
    return run


def finished(laid: Laid) -> Any:
    """The conversations as SFTTrainer takes them."""
    from datasets import Dataset

    ids, labels = [], []
    for start, length in zip(laid.pieces.start.tolist(), laid.pieces.length.tolist(), strict=True):
        part = laid.ids[start : start + length].astype(np.int64)
        ids.append(part)
        labels.append(np.where(laid.trained[start : start + length], part, -100))
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


# --- all of them ------------------------------------------------------------------------------------


def work(name: str, asked: Connection) -> None:
    """A process of its own: runs as many steps as it is asked to, until it is asked for none."""
    given = asked.recv()
    torch.set_num_threads(given.threads)
    while steps := asked.recv():
        torch.manual_seed(0)
        SIDES[name](given, WARM_UP)
        asked.send(SIDES[name](given, steps))


class Side:
    """A process at work on one side, and what its rounds found."""

    def __init__(self, name: str, given: Setting) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.asked, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.asked.send(given)
        self.runs: list[Run] = []

    def speed(self, steps: int) -> float:
        """Real tokens per second of one more round."""
        self.asked.send(steps)
        self.runs.append(self.asked.recv())
        return self.runs[-1].real / self.runs[-1].seconds


def setting(given: argparse.Namespace) -> Setting:
    """Render, pack and shuffle the conversations."""
    base = base_of(given.model)
    if base.rows != base.config.vocab_size:
        sys.exit("the template needs tokens that this base does not have; take another")
    data = SftData(train=[given.data], overlong="truncate")
    laid = read_rows(data.train, data, base.tokenizer, base.max_length, SILENT).laid
    order = np.random.default_rng(0).permutation(len(laid.rows))
    in_row = np.diff(laid.rows.offsets)[order]
    rows = Rows(np.concatenate([[0], in_row.cumsum()]), np.concatenate([laid.rows[row] for row in order]))
    conversations = given.padded or round(given.batch * in_row.mean())
    print(
        f"{len(laid.pieces):,} conversations of {laid.pieces.length.mean():.0f} tokens\n"
        f"a step of {OURS}: {given.batch} rows of {base.max_length}, {in_row.mean():.2f} conversations in each\n"
        f"a step of the padded sides: {conversations} conversations",
        flush=True,
    )
    return Setting(
        given.model,
        replace(laid, rows=rows),
        replace(laid, pieces=laid.pieces.take(rows.pieces), rows=unpacked(len(laid.pieces))),
        given.batch,
        conversations,
        given.threads,
    )


def table(sides: dict[str, Side], speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Print the figures of all sides, and return them."""
    found: dict[str, dict[str, Any]] = {}
    print("\n| side | real tokens/s | llmctl is | padding | peak MiB | layers return | loss |")
    print("|---|---:|---:|---:|---:|---|---:|")
    for name, side in sides.items():
        row: dict[str, Any] = {
            "speed": summary(speeds[name]),
            "ratio": ratio(speeds[OURS], speeds[name]),
            "padding": 1 - sum(run.real for run in side.runs) / sum(run.places for run in side.runs),
            "peak_mib": summary([run.peak / 2**20 for run in side.runs]),
            "dtype": side.runs[0].dtype,
            "loss": side.runs[0].loss,
        }
        found[name] = row
        print(
            f"| {name} | {shown(row['speed'], ',.0f')} | {shown(row['ratio'], '.2f')} | {row['padding']:.0%} "
            f"| {shown(row['peak_mib'], ',.0f')} | {row['dtype']} | {row['loss']:.3f} |"
        )
    theirs = [row for name, row in found.items() if not name.startswith(OURS)]
    fastest = min(theirs, key=lambda row: row["ratio"]["median"])
    least = min(row["peak_mib"]["median"] for row in theirs)
    print(f"\ntokens/s against the faster of trl: {shown(fastest['ratio'], '.2f')} times; the goal is {GOAL}")
    print(
        f"memory against the smaller of trl: {found[OURS]['peak_mib']['median'] / least:.2f} times; the goal is 1"
    )
    return found


def shown(found: Summary, form: str) -> str:
    return f"{found['median']:{form}} ({found['min']:{form}}–{found['max']:{form}})"


SIDES: dict[str, Callable[[Setting, int], Run]] = {
    OURS: partial(llmctl_side, packing=True),
    "llmctl, padded": partial(llmctl_side, packing=False),
    "trl": partial(trl_side, recompute=True),
    "trl, keeping": partial(trl_side, recompute=False),
}


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--data", required=True, help="conversations, in any format that llmctl reads")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps a round (default 16)")
    parser.add_argument(
        "--batch", type=int, default=SftTrain().per_device_train_batch_size, help="packed rows a step"
    )
    parser.add_argument("--padded", type=int, help="conversations a step of the padded sides")
    given = parser.parse_args()
    common = setting(given)
    sides = {name: Side(name, common) for name in SIDES}
    rounds = {name: partial(side.speed, given.steps) for name, side in sides.items()}
    figures = table(sides, interleaved(rounds, given.rounds, show=",.0f"))
    for side in sides.values():
        side.asked.send(0)
        side.process.join()
    report({"rows_a_step": common.rows, "conversations_a_step": common.conversations, **figures})


if __name__ == "__main__":
    main()
