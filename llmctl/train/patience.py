"""Early stopping: when a run ends before its last step, and with which weights.

Both follow from the evaluations in metrics.jsonl, so a resumed run decides as the uninterrupted one would.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.files import folder_atomic

BEST = "best"  # folder in the run: the weights of the lowest evaluation loss so far


class Patience:
    """Evaluations so far, and the weights of the best: the one with the lowest loss.

    Args:
        limit: evaluations without a lower loss after which the run ends; None never ends it.
    """

    def __init__(self, limit: int | None, run: Path) -> None:
        self._limit, self._folder = limit, run / BEST
        self._seen: list[dict[str, Any]] = []

    def remember(self, row: dict[str, Any]) -> None:
        """Take note of an evaluation of an earlier process."""
        if self._limit is not None and "eval_loss" in row:
            self._seen.append(row)

    def look(self, row: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Take note of an evaluation just made; the weights are kept if it is the best."""
        before = self.best
        self.remember(row)
        if self.best is not before:
            with folder_atomic(self._folder) as folder:
                save(folder)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss, the first one among equals: `step` and its figures."""
        return min(self._seen, key=_loss, default=None)

    @property
    def is_out(self) -> bool:
        """Whether the last `limit` evaluations brought no lower loss."""
        if self._limit is None or self.best is None:
            return False
        return len(self._seen) - 1 - self._seen.index(self.best) >= self._limit

    def end(self, load: Callable[[Path], None]) -> dict[str, Any]:
        """Go back to the best weights; returns `best_step` and its evaluation for the final metrics."""
        if self.best is None:
            return {}
        if self.best is not self._seen[-1]:
            load(self._folder)
        found = {name: value for name, value in self.best.items() if name.startswith("eval_")}
        return {"best_step": self.best["step"], **found}


def forget_best(run: Path) -> None:
    """Delete the best weights of a run that is done; until then a killed process may have to end it again."""
    for path in (run / BEST, *run.glob(f".tmp-{BEST}-*")):  # what a killed save left, too
        shutil.rmtree(path, ignore_errors=True)


def _loss(row: dict[str, Any]) -> float:
    # what is no number is no better than anything
    loss = float(row["eval_loss"])
    return math.inf if math.isnan(loss) else loss
