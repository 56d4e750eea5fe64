"""What a training run writes down beside its weights: lines of metrics, and the rows of a step that went bad."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import CheckFailed
from llmctl.files import disk_errors, write_atomic
from llmctl.runs import METRICS
from llmctl.train.checkpoint import Progress, checkpoints

DIVERGED = "diverged.json"


def log_row(run: Path, row: dict[str, Any], name: str = METRICS) -> None:
    """Add a line to metrics.jsonl, or to another file of lines with a `step`."""
    path = run / name
    with disk_errors(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_rows(run: Path, step: int, name: str = METRICS) -> list[dict[str, Any]]:
    """Drop lines written after the checkpoint a run goes on from, and a line cut short by a crash.

    Returns the rows that are left.
    """
    path = run / name
    if not path.is_file():
        return []
    kept = [row for row in rows_in(path) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of lines with a `step`; what a crash or an editor made of others is passed over."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield row


def summary(progress: Progress, last: dict[str, Any]) -> dict[str, Any]:
    """Final metrics: the last loss and evaluation, and what the run took."""
    speed = progress.tokens / progress.seconds if progress.seconds else 0.0
    kept = {
        name: value
        for name, value in last.items()
        if name in ("loss", "best_step") or name.startswith("eval_")
    }
    return {
        **kept,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(speed, 1),
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
