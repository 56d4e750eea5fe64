"""What a training run writes down beside its weights: lines of metrics, and the rows of a step that went bad."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.checkpoints import checkpoints
from llmctl.errors import CheckFailed, UserError
from llmctl.files import disk_errors, write_atomic
from llmctl.manifest import METRICS
from llmctl.reading import Unreadable, read_rows
from llmctl.train.checkpoint import Progress

DIVERGED = "diverged.json"


def log_row(run: Path, row: dict[str, Any], name: str = METRICS) -> None:
    """Add a line to metrics.jsonl, or to another file of lines with a `step`."""
    path = run / name
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_rows(run: Path, step: int, name: str = METRICS) -> list[dict[str, Any]]:
    """Drop lines written after the checkpoint a run goes on from, and lines that are damaged or cut short by a crash.

    Returns the rows that are left. Raises UserError if the file is a pipe, or cannot be read at all.
    """
    path = run / name
    if not path.is_file() and not path.is_fifo():
        return []
    try:
        found = read_rows(path, numbers=name == METRICS)
    except Unreadable as error:
        raise UserError(f"{path}: {error}", "delete it; the run goes on without its earlier lines") from None
    kept = [row for row in found.rows if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


def speed(progress: Progress) -> float:
    """Trained tokens per second of the steps of a whole run."""
    return progress.tokens / progress.seconds if progress.seconds else 0.0


def end_facts(progress: Progress, last: dict[str, Any]) -> dict[str, str]:
    """What the line that stays of a training says: the figures of the table, as `summary` has them."""
    facts = {"loss": f"{last['loss']:.3f}"} if "loss" in last else {}
    return facts | {"tokens/s": f"{speed(progress):,.0f}"}


def summary(progress: Progress, last: dict[str, Any]) -> dict[str, Any]:
    """Final metrics: the last loss and evaluation, and what the run took.

    `seconds` are all of the training, with evaluation, samples and saving; `tokens_per_second` is that of the steps.
    """
    kept = {
        name: value
        for name, value in last.items()
        if name in ("loss", "best_step") or name.startswith("eval_")
    }
    return {
        **kept,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.elapsed, 1),
        "tokens_per_second": round(speed(progress), 1),
    }


@dataclass
class BadStep:
    """An optimizer step whose numbers are not finite; `peak` is the rate that `train.learning_rate` asks for."""

    step: int
    loss: float
    norm: float
    rate: float
    peak: float


def diverged(run: Path, bad: BadStep, rows: list[list[int]]) -> CheckFailed:
    """Write the token ids of the step's rows to diverged.json; the error to raise."""
    dump = {
        "step": bad.step,
        "loss": repr(bad.loss),
        "grad_norm": repr(bad.norm),
        "learning_rate": bad.rate,
        "input_ids": rows,
    }
    write_atomic(run / DIVERGED, json.dumps(dump))
    found = checkpoints(run)
    kept = f"the last good checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"
    finite = math.isfinite(bad.loss)
    what = f"loss is {bad.loss:.3g} but its gradient is {bad.norm}" if finite else f"loss is {bad.loss}"
    return CheckFailed(
        f"{run}: step {bad.step}: {what}; {kept}",
        f"start a new run with a lower train.learning_rate (now {bad.peak:g}) or a longer "
        f"train.warmup_ratio; the rows of this step are in {DIVERGED}",
    )
