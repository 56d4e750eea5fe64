"""Early stopping: when a run ends before its last step, and with which weights.

Both follow from the evaluations in metrics.jsonl, so a resumed run decides as the uninterrupted one would.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.files import folder_atomic

BEST = "best"  # folder in the run: the weights of the lowest evaluation loss so far


class Patience:
    """Evaluation losses so far, and the weights of the lowest.

    Args:
        limit: evaluations without a lower loss after which the run ends; None never ends it.
    """

    def __init__(self, limit: int | None, run: Path) -> None:
        self._limit, self._folder = limit, run / BEST
        self._losses: list[tuple[int, float]] = []

    def remember(self, row: dict[str, Any]) -> None:
        """Take note of an evaluation of an earlier process."""
        if self._limit is not None and "eval_loss" in row:
            self._losses.append((row["step"], row["eval_loss"]))

    def look(self, row: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Take note of an evaluation just made; the weights are kept if it is the best."""
        before = self.best
        self.remember(row)
        if self._losses and self.best != before:
            with folder_atomic(self._folder) as folder:
                save(folder)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest evaluation, the first one among equals."""
        return min(self._losses, key=lambda found: found[1], default=None)

    @property
    def is_out(self) -> bool:
        """Whether the last `limit` evaluations brought no lower loss."""
        if self._limit is None or self.best is None:
            return False
        return len(self._losses) - 1 - self._losses.index(self.best) >= self._limit

    def end(self, load: Callable[[Path], None]) -> dict[str, Any]:
        """Go back to the best weights; returns `best_step` and its `eval_loss` for the final metrics."""
        if self.best is None:
            return {}
        step, loss = self.best
        if step != self._losses[-1][0]:
            load(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)
        return {"best_step": step, "eval_loss": loss}
