"""The one training loop. It takes batches and a loss, and knows no stage by name."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmctl.errors import CheckFailed
from llmctl.kernels.device import Compute
from llmctl.kernels.threads import Work, count_work, use_threads
from llmctl.recipe.train import StepsSection
from llmctl.runs import SAMPLES
from llmctl.talk import Bar, Talk
from llmctl.train.checkpoint import (
    Progress,
    checkpoints,
    clear_unfinished,
    load_training_state,
    save_checkpoint,
)
from llmctl.train.journal import BadStep, cut_rows, diverged, log_row, summary
from llmctl.train.losses import Loss, trained_tokens
from llmctl.train.optimizer import make_optimizer
from llmctl.train.patience import Patience
from llmctl.train.schedule import learning_rate
from llmctl.train.stop import interrupted, signals

# what the progress line shows of an evaluation: the first of these there is
SHOWN = {"eval_bits_per_byte": "eval bits/byte", "eval_loss": "eval loss"}
WORK = Work("training", "tokens")


class Batches(Protocol):
    """A source of training data in which a step is found by its number alone."""

    steps_per_epoch: int

    def step(self, index: int) -> list[dict[str, Tensor]]:
        """The micro-batches of 0-based optimizer step `index`: [B, T] tensors by name."""


@dataclass
class Job:
    """What the loop is given.

    Attributes:
        evaluate: metrics of the model as it stands, names without `eval_`, in a precision of its own
            choice; None to skip evaluation.
        save: write the model's files into a folder.
        load: read them back from a checkpoint.
        sample: what the model answers now, after so many steps, one entry a prompt; None to take no samples.
        sample_steps: steps between samples; as often as evaluations when None.
        after_step: what the model moves outside the gradient, called after each step of the optimizer.
        patience: evaluations without a lower loss after which the run ends, with the weights of the
            lowest; None never ends it early.
        compiled: the model goes through torch.compile, which would begin anew with another number of threads.
    """

    model: nn.Module
    batches: Batches
    loss: Loss
    settings: StepsSection
    compute: Compute
    folder: Path
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    evaluate: Callable[[], dict[str, float]] | None = None
    sample: Callable[[int], list[dict[str, Any]]] | None = None
    sample_steps: int | None = None
    after_step: Callable[[], None] | None = None
    patience: int | None = None
    compiled: bool = False


def total_steps(settings: StepsSection, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: max_steps, or the epochs' worth, at least one."""
    return settings.max_steps or max(1, math.ceil(settings.num_train_epochs * steps_per_epoch))


def every(steps: int, setting: int | None) -> int:
    """An interval in steps: as set, or a tenth of the run."""
    return setting or max(1, steps // 10)


def train(job: Job, talk: Talk) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in the folder if there is one.

    Writes metrics.jsonl and checkpoints into `job.folder`; the last checkpoint is the final state.

    Returns the final metrics: loss, tokens, seconds, tokens_per_second, and the evaluation's.

    Raises:
        CheckFailed: a loss or gradient that is not finite. The weights were not updated with it,
            and the checkpoints are those of before.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written first.
        UserError: a checkpoint cannot be written or read.
    """
    return _Training(job, talk).run()


class _Training:
    """The state of one call of `train`."""

    def __init__(self, job: Job, talk: Talk) -> None:
        self.job, self.talk, self.settings = job, talk, job.settings
        self.steps = total_steps(job.settings, job.batches.steps_per_epoch)
        threads, device = job.settings.threads, job.compute.device
        use_threads(threads, "train.threads", device, talk, fixed=job.compiled)
        self.weights = [weight for weight in job.model.parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(job.model, job.settings)
        self.progress = Progress()
        self.last: dict[str, Any] = {}
        self.window = _Window(job.compute.device)
        self.patience = Patience(job.patience, job.folder)

    def run(self) -> dict[str, Any]:
        self._restore()
        stop = threading.Event()
        with signals(stop), self.talk.bar("training", self.steps, "steps") as bar:
            bar.advance(self.progress.step)
            if self.progress.step == 0:
                self._sample()
            while not self._is_over:
                self._step()
                self._report(bar)
                done = self.progress.step
                if done % every(self.steps, self.settings.save_steps) == 0 or self._is_over or stop.is_set():
                    self._save()
                if stop.is_set() and not self._is_over:
                    raise interrupted(self.job.folder, done, self.steps)
        if self.patience.is_out and self.progress.step < self.steps:
            self.talk.say(f"stopped at step {self.progress.step}: the evaluation loss no longer falls")
        self.last |= self.patience.end(self.job.load)
        return summary(self.progress, self.last)

    @property
    def _is_over(self) -> bool:
        return self.progress.step >= self.steps or self.patience.is_out

    def _step(self) -> None:
        settings, step = self.settings, self.progress.step
        started = time.perf_counter()
        rate = learning_rate(
            step,
            self.steps,
            peak=settings.learning_rate,
            kind=settings.lr_scheduler_type,
            warmup_ratio=settings.warmup_ratio,
            min_ratio=settings.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micro_batches = self.job.batches.step(step)
        tokens = trained_tokens(micro_batches)
        total = torch.zeros((), device=self.job.compute.device)
        self.job.model.train()
        for batch in micro_batches:
            with self.job.compute.autocast():
                loss = self.job.loss(self.job.model, self._moved(batch), tokens)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.weights, settings.max_grad_norm, foreach=True)
        # before the update, so that bad numbers never reach the weights or the optimizer
        if not math.isfinite(norm) or not math.isfinite(total):
            raise self._diverged(float(total), float(norm), micro_batches, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.job.after_step is not None:
            self.job.after_step()
        spent = time.perf_counter() - started
        self.progress = Progress(step + 1, self.progress.tokens + tokens, self.progress.seconds + spent)
        self.window.add(total, tokens, spent, norm, rate)
        count_work(WORK, sum(batch["input_ids"].numel() for batch in micro_batches), spent)

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self.job.compute.device
        if device.type != "cuda":
            return {name: value.to(device) for name, value in batch.items()}
        return {name: value.pin_memory().to(device, non_blocking=True) for name, value in batch.items()}

    def _report(self, bar: Bar) -> None:
        done, steps, settings = self.progress.step, self.steps, self.settings
        facts: dict[str, str] = {}
        if done % settings.logging_steps == 0 or done == steps:
            row = {"step": done, "epoch": done / self.job.batches.steps_per_epoch, **self.window.take()}
            self.last |= row | {"tokens": self.progress.tokens}
            log_row(self.job.folder, row | {"tokens": self.progress.tokens})
            facts = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
        if self.job.evaluate is not None and (done % every(steps, settings.eval_steps) == 0 or done == steps):
            found = {f"eval_{name}": value for name, value in self._evaluated().items()}
            self.last |= found
            log_row(self.job.folder, {"step": done, **found})
            self.patience.look({"step": done, **found}, self.job.save)
            shown = next((name for name in SHOWN if name in found), None)
            facts |= {SHOWN[shown]: f"{found[shown]:.3f}"} if shown else {}
        if done % (self.job.sample_steps or every(steps, settings.eval_steps)) == 0 or self._is_over:
            self._sample()
        bar.advance(1, **facts)

    def _sample(self) -> None:
        """Let the model answer, for those who watch; nothing of the run depends on it."""
        if self.job.sample is None:
            return
        self.job.model.eval()
        for row in self.job.sample(self.progress.step):
            log_row(self.job.folder, {"step": self.progress.step, **row}, SAMPLES)

    def _evaluated(self) -> dict[str, float]:
        assert self.job.evaluate is not None
        self.job.model.eval()
        with torch.no_grad():
            return self.job.evaluate()

    def _save(self) -> None:
        keep = self.settings.save_total_limit
        save_checkpoint(self.job.folder, self.progress, self.optimizer, self.job.save, keep)

    def _restore(self) -> None:
        clear_unfinished(self.job.folder)
        found = checkpoints(self.job.folder)
        if found:
            self.job.load(found[-1])
            self.progress = load_training_state(found[-1], self.optimizer)
            self.talk.say(f"resuming from step {self.progress.step} of {self.steps}")
        # a run that was killed between its last step and its end still reports what it had found
        for row in cut_rows(self.job.folder, self.progress.step):
            self.last |= row
            self.patience.remember(row)
        # without a checkpoint the run begins with the samples of step 0 again
        cut_rows(self.job.folder, self.progress.step or -1, SAMPLES)

    def _diverged(
        self, loss: float, norm: float, batches: list[dict[str, Tensor]], rate: float
    ) -> CheckFailed:
        bad = BadStep(self.progress.step + 1, loss, norm, rate, self.settings.learning_rate)
        return diverged(
            self.job.folder, bad, [row for batch in batches for row in batch["input_ids"].tolist()]
        )


class _Window:
    """Sums since the last metrics line."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.tokens, self.seconds = 0, 0.0
        self.norm: Tensor | None = None
        self.rate = 0.0

    def add(self, loss: Tensor, tokens: int, seconds: float, norm: Tensor, rate: float) -> None:
        self.loss += loss * tokens
        self.tokens += tokens
        self.seconds += seconds
        self.norm, self.rate = norm, rate

    def take(self) -> dict[str, float]:
        row = {
            "loss": float(self.loss) / max(1, self.tokens),
            "grad_norm": float(self.norm) if self.norm is not None else 0.0,
            "learning_rate": self.rate,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
        }
        self._clear()
        return row
