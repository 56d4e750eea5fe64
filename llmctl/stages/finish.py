"""How a training stage ends: the finished files move into the run folder, and a page is written about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.files import folder_atomic, sync_folder, write_atomic
from llmctl.report import report_html
from llmctl.runs import METRICS, SAMPLES
from llmctl.train.journal import rows_in

REPORT = "report.html"
FINAL = "final"  # the finished model, built beside the run's other files and then moved up


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


def write_report(out: Path, stage: str, metrics: dict[str, Any], samples: list[tuple[str, str]]) -> None:
    """report.html: curves from metrics.jsonl, the final figures, and samples as (prompt, text)."""
    page = report_html(f"{stage} {out.name}", _lines(out / METRICS), metrics, samples)
    write_atomic(out / REPORT, page)


def first_and_last_samples(out: Path) -> list[tuple[str, str]]:
    """The samples of the first and of the last step that has any, as (step and prompt, answer)."""
    rows = _lines(out / SAMPLES) if (out / SAMPLES).is_file() else []
    ends = sorted({row["step"] for row in rows})
    chosen = [row for row in rows if row["step"] in (ends[:1] + ends[-1:])]
    return [(f"step {row['step']}: {row['prompt']}", row["answer"]) for row in chosen]


def _lines(path: Path) -> list[dict[str, Any]]:
    return list(rows_in(path))
