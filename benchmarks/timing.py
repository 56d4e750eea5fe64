"""What the benchmarks share: sides run in turn, summaries with their range, and the name of the CPU.

Timings on a shared machine drift, so the sides of a comparison are never run one after the other: each
round runs every side once, and a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence

Summary = dict[str, float]
SHORTEST = 0.05  # seconds that one timing of a small operation lasts at least


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; `doc`, the claim, is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"times each side runs (default {rounds})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    return parser


def interleaved(
    sides: dict[str, Callable[[], float]], rounds: int, show: str | None = None
) -> dict[str, list[float]]:
    """The figure each side returns, round by round.

    Args:
        show: a format for the figures, such as ",.0f"; every round is printed with it. None is silent.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
        if show is not None:
            line = "  ".join(f"{name} {values[-1]:{show}}" for name, values in figures.items())
            print(f"round {number + 1}: {line}", flush=True)
    return figures


def seconds_per_call(work: Callable[[], object], shortest: float = SHORTEST) -> float:
    """Mean wall time of a call, over as many calls as last `shortest` seconds; one call before is not counted."""
    work()
    calls, started = 0, time.perf_counter()
    while True:
        work()
        calls += 1
        spent = time.perf_counter() - started
        if spent >= shortest:
            return spent / calls


def compare(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each side, round by round."""

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: seconds_per_call(work)

    return interleaved({name: timed(work) for name, work in sides.items()}, rounds)


def summary(values: Sequence[float]) -> Summary:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Summary:
    """Median and range of the ratios within the rounds."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def speedups(seconds: dict[str, list[float]], ours: str) -> dict[str, Summary]:
    """`other/ours` -> how many times as long the other sides take."""
    return {f"{name}/{ours}": ratio(seconds[name], seconds[ours]) for name in seconds if name != ours}


def line(name: str, found: Summary, scale: float = 1.0, unit: str = "") -> str:
    """One line for people: median, range, unit."""
    low, middle, high = (found[key] * scale for key in ("min", "median", "max"))
    return f"{name:32} {middle:10.3f}  ({low:.3f} – {high:.3f}) {unit}".rstrip()


def cpu_name() -> str:
    """The model name of the processor."""
    from llmctl.kernels.device import cpu_facts  # imports torch: not before the timing of small processes

    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def report(result: dict[str, object]) -> None:
    """Print the CPU and, last, all figures as one JSON document."""
    name = cpu_name()
    print(f"CPU: {name}")
    print(json.dumps({"cpu": name, **result}, indent=2, default=float))
