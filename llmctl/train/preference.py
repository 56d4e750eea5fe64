"""Learning from preferences: TRL's reward and DPO trainers under this program's rules.

TRL computes the losses and transformers' Trainer takes the steps. Rows come finished; optimizer and
schedule, metrics, checkpoints, interruption and what happens when numbers go bad are those of the loop.
"""

from __future__ import annotations

import hashlib
import io
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from llmctl.errors import UserError
from llmctl.files import write_atomic
from llmctl.kernels.device import Compute
from llmctl.kernels.threads import count_work, use_threads
from llmctl.recipe.preference import DpoSection, PreferenceTrain, RewardSection
from llmctl.talk import Talk
from llmctl.train.checkpoint import (
    Progress,
    checkpoints,
    clear_unfinished,
    load_training_state,
    save_checkpoint,
)
from llmctl.train.journal import BadStep, cut_rows, diverged, log_row, summary
from llmctl.train.loop import WORK, every, total_steps
from llmctl.train.optimizer import make_optimizer
from llmctl.train.schedule import learning_rate
from llmctl.train.stop import interrupted, signals

if TYPE_CHECKING:
    from peft import PeftModel

    from llmctl.train.trainers import Seen

REFERENCE = "reference.pt"
TRAINER_STATE = "trainer_state.json"  # transformers' own count of steps, in every checkpoint


@dataclass
class PreferenceJob:
    """What is trained, on what, and how.

    Attributes:
        model: on its device, as the run began: DPO's reference is this model, so a run that is resumed
            hands in the same one and `load` puts the checkpoint's weights into it.
        objective: which of the two it is, and its settings.
        rows: token ids. For DPO `prompt_ids, chosen_ids, rejected_ids`, the last two without the prompt;
            for a reward model `chosen_ids, rejected_ids`, whole. Nothing is cut.
        eval_rows: the same; empty for no evaluation.
        settings: with a learning rate.
        pad_id: a token to fill rows with, the model's own pad token if it has one.
        save: write the model's files into a folder.
        load: read them back from a checkpoint, in place.
    """

    model: PreTrainedModel | PeftModel
    objective: RewardSection | DpoSection
    rows: list[dict[str, Any]]
    eval_rows: list[dict[str, Any]]
    settings: PreferenceTrain
    compute: Compute
    folder: Path
    pad_id: int
    save: Callable[[Path], None]
    load: Callable[[Path], None]


def train_preferences(job: PreferenceJob, talk: Talk) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in the folder if there is one.

    Writes metrics.jsonl and checkpoints into `job.folder`, the last of which is the final state; for
    DPO also reference.pt, the log-probabilities under the model as it began.

    Returns the final metrics: loss, tokens, seconds, tokens_per_second, and the evaluation's.

    Raises:
        CheckFailed: a loss or gradient that is not finite. The weights were not updated with it,
            and the checkpoints are those of before.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written first.
        UserError: a checkpoint cannot be written or read; DPO on a model whose output head is adapted.
    """
    use_threads(job.settings.threads, "train.threads", job.compute.device, talk)
    run = _Run(job, talk)
    with _quiet():
        try:
            return run.train()
        finally:
            _unwrap(run.model)


class _Run(TrainerCallback):
    """The state of one call of `train_preferences`; the trainer calls it back at every step."""

    def __init__(self, job: PreferenceJob, talk: Talk) -> None:
        self.job, self.talk, self.settings = job, talk, job.settings
        self.model = _inner(job.model)
        micro_batches = math.ceil(len(job.rows) / job.settings.per_device_train_batch_size)
        self.per_epoch = math.ceil(micro_batches / job.settings.gradient_accumulation_steps)
        self.steps = total_steps(job.settings, self.per_epoch)
        self.optimizer = make_optimizer(job.model, job.settings)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.progress = Progress()
        self.last: dict[str, Any] = {}
        self.step, self.window = _Mean(), _Mean()
        self.norm = self.rate = self.seconds = 0.0
        self.stop = threading.Event()
        self.eval_rows = job.eval_rows

    def train(self) -> dict[str, Any]:
        from llmctl.train.trainers import Setup, make_trainer

        job = self.job
        setup = Setup(job.rows, job.pad_id, self._arguments(), (self.optimizer, self._schedule()), self)
        self.trainer = make_trainer(self.model, job.objective, setup, lambda seen: self.step.add(seen))
        if isinstance(job.objective, DpoSection):
            self._add_reference()
        found = self._restore()
        with signals(self.stop), self.talk.bar("training", self.steps, "steps") as self.bar:
            self.bar.advance(self.progress.step)
            if self.progress.step < self.steps:
                torch.manual_seed(self.settings.seed)  # whatever was computed before
                self.clock = time.perf_counter()
                self.trainer.train(resume_from_checkpoint=str(found) if found else None)
        if self.progress.step < self.steps:
            raise interrupted(job.folder, self.progress.step, self.steps)
        return summary(self.progress, self.last)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step = _Mean()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Clip, which the trainer is told not to do: here a norm that is not finite can still stop the step."""
        norm = nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm, foreach=True)
        self.norm, self.rate = float(norm), float(self.optimizer.param_groups[0]["lr"])
        if not math.isfinite(self.norm) or not math.isfinite(self.step.loss):
            bad = BadStep(
                self.progress.step + 1,
                self.step.loss,
                self.norm,
                self.rate,
                self.settings.learning_rate,
            )
            rows = [row for batch in self.trainer.step_batches for row in batch["input_ids"].tolist()]
            raise diverged(self.job.folder, bad, rows)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        spent, before = time.perf_counter() - self.clock, self.progress
        tokens = before.tokens + self.step.tokens
        self.progress = Progress(state.global_step, tokens, before.seconds + spent)
        self.window.merge(self.step)
        self.seconds += spent
        count_work(WORK, self.step.tokens, spent)
        self._report()
        done = self.progress.step
        if (
            done % every(self.steps, self.settings.save_steps) == 0
            or done == self.steps
            or self.stop.is_set()
        ):
            self._save(state)
        control.should_training_stop |= self.stop.is_set()
        self.clock = time.perf_counter()
        return control

    def _report(self) -> None:
        done, steps = self.progress.step, self.steps
        facts: dict[str, str] = {}
        if done % self.settings.logging_steps == 0 or done == steps:
            row = {
                "step": done,
                "epoch": done / self.per_epoch,
                **self.window.means(),
                "grad_norm": self.norm,
                "learning_rate": self.rate,
                "tokens_per_second": self.window.tokens / self.seconds if self.seconds else 0.0,
                "tokens": self.progress.tokens,
            }
            self._log(row)
            facts = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
            self.window, self.seconds = _Mean(), 0.0
        if self.eval_rows and (done % every(steps, self.settings.eval_steps) == 0 or done == steps):
            found = {f"eval_{name}": value for name, value in self._evaluated().items()}
            self._log({"step": done, **found})
            facts["eval accuracy"] = f"{found['eval_accuracy']:.3f}"
        self.bar.advance(1, **facts)

    @torch.no_grad()
    def _evaluated(self) -> dict[str, float]:
        """Loss and figures of the evaluation rows, each pair counting once."""
        from llmctl.train.trainers import batches

        self.model.eval()
        found = _Mean()
        for inputs in batches(self.trainer, self.eval_rows, self.settings.per_device_eval_batch_size):
            found.add(self.trainer.measure(self.model, inputs))
        return found.means()

    def _log(self, row: dict[str, Any]) -> None:
        self.last |= row
        log_row(self.job.folder, row)

    def _save(self, state: TrainerState) -> None:
        def write(folder: Path) -> None:
            self.job.save(folder)
            state.save_to_json(str(folder / TRAINER_STATE))

        save_checkpoint(self.job.folder, self.progress, self.optimizer, write, self.settings.save_total_limit)

    def _restore(self) -> Path | None:
        """Put back weights, optimizer and schedule; the path of the checkpoint they come from."""
        clear_unfinished(self.job.folder)
        found = checkpoints(self.job.folder)
        if found:
            self.job.load(found[-1])
            self.progress = load_training_state(found[-1], self.optimizer)
            self.trainer.lr_scheduler = self._schedule(self.progress.step)
            self.talk.say(f"resuming from step {self.progress.step} of {self.steps}")
        # a run that was killed between its last step and its end still reports what it had found
        for row in cut_rows(self.job.folder, self.progress.step):
            self.last |= row
        return found[-1] if found else None

    def _schedule(self, done: int = 0) -> LambdaLR:
        """The loop's schedule as torch's, as it stands after `done` steps."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["initial_lr"] = settings.learning_rate

        def share(step: int) -> float:
            return learning_rate(
                step,
                self.steps,
                peak=1.0,
                kind=settings.lr_scheduler_type,
                warmup_ratio=settings.warmup_ratio,
                min_ratio=settings.min_lr_ratio,
            )

        return LambdaLR(self.optimizer, share, last_epoch=done - 1)

    def _arguments(self) -> dict[str, Any]:
        """TrainingArguments; all they would do besides taking steps is off, for it is done here."""
        settings, device = self.settings, self.job.compute.device
        return {
            "output_dir": str(self.job.folder),
            "max_steps": self.steps,
            "per_device_train_batch_size": settings.per_device_train_batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "max_grad_norm": 0.0,
            "seed": settings.seed,
            "data_seed": settings.seed,
            "use_cpu": device.type == "cpu",
            "bf16": self.job.compute.dtype == torch.bfloat16,
            "gradient_checkpointing": False,  # the stage has asked the model itself
            "dataloader_pin_memory": device.type == "cuda",
            "logging_strategy": "no",
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "log_level": "error",
        }

    def _add_reference(self) -> None:
        """Give each row its log-probabilities under the model as it began, computed once a run."""
        _check_head(self.model)
        rows, path = [*self.job.rows, *self.job.eval_rows], self.job.folder / REFERENCE
        mark = _fingerprint(rows)
        found = _read_reference(path, mark)
        if found is None:
            with self.talk.bar("reference", len(rows), "pairs") as bar:
                size = self.settings.per_device_eval_batch_size
                found = self.trainer.reference(rows, size, bar.advance)
            raw = io.BytesIO()
            torch.save({"rows": mark, "logps": found}, raw)
            write_atomic(path, raw.getvalue())
        columns = {"ref_chosen_logps": found[:, 0].tolist(), "ref_rejected_logps": found[:, 1].tolist()}
        count = len(self.job.rows)
        for name, values in columns.items():
            self.trainer.train_dataset = self.trainer.train_dataset.add_column(name, values[:count])
            self.eval_rows = [
                {**row, name: value} for row, value in zip(self.eval_rows, values[count:], strict=True)
            ]


class _Mean:
    """Means over pairs, of one step or several."""

    def __init__(self) -> None:
        self.loss = 0.0  # summed over pairs
        self.pairs = self.tokens = 0
        self.figures: dict[str, float] = {}

    def add(self, seen: Seen) -> None:
        self.pairs += seen.pairs
        self.tokens += seen.tokens
        self.loss += float(seen.loss.detach()) * seen.pairs
        for name, value in seen.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value * seen.pairs

    def merge(self, other: _Mean) -> None:
        self.pairs += other.pairs
        self.tokens += other.tokens
        self.loss += other.loss
        for name, value in other.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        pairs = max(1, self.pairs)
        return {"loss": self.loss / pairs, **{name: value / pairs for name, value in self.figures.items()}}


def _inner(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that computes, with its adapters inside it."""
    if isinstance(model, PreTrainedModel):
        return model
    return model.get_base_model()


def _check_head(model: PreTrainedModel) -> None:
    """TRL reads `weight` and `bias` of the output head instead of calling it."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        return
    if not model.head_reads_as_matrix:
        raise UserError(
            "the output head carries an adapter, which DPO would not train",
            "leave lm_head out of lora.target_modules",
        )
    vars(head)["bias"] = None  # PEFT's wrapper of trained rows has `weight` only


def _fingerprint(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            digest.update(np.asarray([len(row[name]), *row[name]], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _read_reference(path: Path, mark: str) -> Tensor | None:
    """What an earlier part of the run found, if it was for these rows."""
    try:
        held = torch.load(path, weights_only=True)
        return held["logps"] if held["rows"] == mark else None
    # missing, or damaged in any of the ways torch tells it: it is computed again
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log lines and warnings of what will change in later versions."""
    before = logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


def _unwrap(model: PreTrainedModel) -> None:
    """Take off what TRL and accelerate put over the model's forward."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
