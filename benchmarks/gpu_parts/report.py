"""What a part reports: one row for each case, written to disk at once, so that a killed part loses only what it had
not finished.

A row is a dictionary with `name` and `status` (ok, failed or skipped), and of these what the case has:

    value, low, high, unit   the figure: a median with its range, or a word
    beside                   what it is compared with, in words with its figure
    ratio                    how many times as fast as what is beside it
    difference, bound        a check: it fails unless difference <= bound
    flops                    floating-point operations in a second, for MFU
    note                     a remark, the reason of a skipped case, the error of a failed one
    detail                   True keeps a row that is ok out of the table; the JSON has it
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a part that needs no torch need not wait for it, and one that finds none says so
    import torch

Row = dict[str, Any]
OURS = (
    "llmctl",
    "gpu_parts",
    "tests",
)  # a module of these that cannot be imported is a fault, not a missing package


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more: an illegal access poisons all that its process does afterwards."""


class Report:
    """What a part is given: where to compute, how large, how long, and where its rows go.

    Attributes:
        tiny: sizes for a dry run on a CPU: every line runs, no figure means anything.
    """

    def __init__(self, rows: Path, device: str, tiny: bool, seconds: float) -> None:
        self.tiny = tiny
        self._file, self._kind, self._end = rows, device, time.monotonic() + seconds

    @cached_property
    def device(self) -> torch.device:
        """Where the part computes."""
        import torch

        return torch.device(self._kind)

    def left(self) -> float:
        """Seconds until the part should be done."""
        return self._end - time.monotonic()

    def size(self, real: Any, tiny: Any) -> Any:
        """The first, or in a dry run the second."""
        return tiny if self.tiny else real

    def row(self, name: str, **figures: Any) -> None:
        """Write one row. Its status follows from `difference` and `bound` unless it is given."""
        if "bound" in figures:
            held = figures["difference"] <= figures["bound"]  # False for a NaN
            figures = {"status": "ok" if held else "failed", **figures}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "status": "ok", **figures}, default=float) + "\n")
        print(f"{name}: {figures}", flush=True)

    def case(self, name: str, work: Callable[[], Row], seconds: float = 0.0) -> None:
        """Run one case and write its row, whatever becomes of it; the cases after it run all the same.

        Args:
            work: returns the figures of the row.
            seconds: about what it takes: with less left, the case is skipped.

        Raises DeviceLost where no further case could run.
        """
        if self.left() < seconds:
            self.row(name, status="skipped", note="no time left in this part")
            return
        try:
            self.row(name, **work())
        except ModuleNotFoundError as error:
            if is_ours(error):
                raise
            self.row(name, status="skipped", note=f"no package {error.name}")
        except Exception as error:
            traceback.print_exc()
            self.row(name, status="failed", note=describe(error))
            self._refuse_lost()
        finally:
            self.free()

    def free(self) -> None:
        """Give back the memory of what is no longer referred to."""
        gc.collect()
        if self._kind == "cuda":
            import torch

            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def _refuse_lost(self) -> None:
        try:
            self.synchronize()
        except RuntimeError as error:
            raise DeviceLost(describe(error)) from None


def is_ours(error: ModuleNotFoundError) -> bool:
    """Whether what cannot be imported belongs to this project."""
    return (error.name or "").split(".")[0] in OURS


def describe(error: BaseException) -> str:
    """An error as one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def number(value: Any) -> str:
    """A figure for people: four digits, or all before the point. A word stays as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
