"""Parts that go wrong in every way a part can; `test_gpu.py` runs them as `benchmarks/gpu.py` runs its own."""

from __future__ import annotations

import importlib
import os
import signal
import time
from typing import Any


def good(report: Any) -> None:
    report.row("before", value=1.5, unit="s")
    report.case("a case that raises", lambda: 1 / 0)
    report.case("without its package", lambda: importlib.import_module("no_such_package"))
    report.case("a check that holds", lambda: {"difference": 1e-6, "bound": 1e-4})


def within_bounds(report: Any) -> None:
    report.case("a check that holds", lambda: {"difference": 1e-6, "bound": 1e-4})


def not_a_number(report: Any) -> None:
    report.case("a check of a NaN", lambda: {"difference": float("nan"), "bound": 1e-4})


def raises(report: Any) -> None:
    report.row("before")
    raise RuntimeError("no kernel image | is available\nsecond line")


def hangs(report: Any) -> None:
    report.row("before")
    time.sleep(600)


def is_killed(report: Any) -> None:
    report.row("before")
    os.kill(os.getpid(), signal.SIGKILL)


def lacks_a_package(report: Any) -> None:
    importlib.import_module("no_such_package.inside")


def lacks_a_module_of_ours(report: Any) -> None:
    importlib.import_module("llmctl.no_such_module")


def is_out_of_time(report: Any) -> None:
    report.case("too long", lambda: {"value": 1}, seconds=1e9)
