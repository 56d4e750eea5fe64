"""How a training stage ends: the finished files move into the run folder, and a page is written about it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.files import folder_atomic, sync_folder, write_atomic
from llmctl.leftovers import FINAL
from llmctl.manifest import METRICS, SAMPLES
from llmctl.reading import Unreadable, read_rows
from llmctl.report import Sample, report_html
from llmctl.runs import Run
from llmctl.summary import summarize

REPORT = "report.html"
STAMP = "%Y-%m-%dT%H:%M:%S%z"  # as manifests write a time


def install(save: Callable[[Path], None], out: Path) -> None:
    """Put what `save` writes into the run folder, each file whole or not at all."""
    with folder_atomic(out / FINAL) as folder:
        save(folder)
    for file in sorted((out / FINAL).iterdir()):
        if file.is_dir() and (out / file.name).is_dir():
            shutil.rmtree(out / file.name)  # named chat templates of an interrupted attempt
        os.replace(file, out / file.name)
    shutil.rmtree(out / FINAL)
    sync_folder(out)


def write_report(run: Run, metrics: dict[str, Any], samples: list[Sample]) -> None:
    """report.html of a run that is about to be done: what it is, curves from metrics.jsonl, samples."""
    rows = _lines(run.path / METRICS)
    ended = {
        "status": "done",
        "finished": time.strftime(STAMP),
        "metrics": metrics,
        "outputs": dict.fromkeys(_names(run.path)),
    }
    summary = summarize(str(run.path), run.manifest | ended, rows)
    write_atomic(run.path / REPORT, report_html(summary, rows, samples))


def _names(out: Path) -> list[str]:
    return [file.name for file in out.iterdir()]


def first_and_last_samples(out: Path) -> list[Sample]:
    """The samples of the first and of the last step that has any."""
    rows = [
        row
        for row in _lines(out / SAMPLES)
        if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str)
    ]
    ends = sorted({row["step"] for row in rows})
    chosen = [row for row in rows if row["step"] in (ends[:1] + ends[-1:])]
    return [Sample(row["step"], row["prompt"], row["answer"], row.get("reference") or "") for row in chosen]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path, numbers=path.name == METRICS).rows
    except Unreadable:
        return []  # a page without curves; the model is finished all the same
