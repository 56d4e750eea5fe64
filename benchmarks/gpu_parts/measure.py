"""Time and difference, as all parts measure them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timing import interleaved, ratio, seconds_per_call, summary
from torch import Tensor

from gpu_parts.report import Report, Row, number

Work = Callable[[], object]
SHORTEST = 0.05  # seconds that one timing lasts at least
MOST_CALLS = 200  # in one timing


def seconds_of(work: Work, device: torch.device) -> float:
    """Mean seconds of a call. On a GPU by its own clock, over calls that wait in its queue.

    A first call, which may compile and allocate, is not counted.
    """
    if device.type != "cuda":
        return seconds_per_call(work, SHORTEST / 10)
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    calls = int(min(MOST_CALLS, max(3, SHORTEST / (time.perf_counter() - began))))
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def seconds_in_turn(sides: Mapping[str, Work], report: Report, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds per call of each side, round by round."""
    timed = {name: (lambda work=work: seconds_of(work, report.device)) for name, work in sides.items()}
    return interleaved(timed, report.size(rounds, 1))


def milliseconds(seconds: Mapping[str, Sequence[float]], ours: str, other: str) -> Row:
    """Row figures of one side, with another beside it."""
    return rate(
        {name: [1e3 * s for s in each] for name, each in seconds.items()}, ours, other, "ms", less=True
    )


def rate(
    figures: Mapping[str, Sequence[float]], ours: str, other: str | None, unit: str, less: bool = False
) -> Row:
    """Row figures of one side's rounds, with another's beside them; `less` where a smaller figure is better."""
    row = _spread(figures[ours]) | {"unit": unit}
    if other is not None:
        pair = (figures[other], figures[ours]) if less else (figures[ours], figures[other])
        row["beside"] = f"{other}: {number(statistics.median(figures[other]))} {unit}"
        row["ratio"] = ratio(*pair)["median"]
    return row


def _spread(values: Sequence[float]) -> Row:
    found = summary(values)
    return {"value": found["median"], "low": found["min"], "high": found["max"]}


def apart(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; infinity where a number found is not finite."""
    expected = expected.detach().double()
    found = found.detach().to(expected.device).double()
    if not bool(found.isfinite().all()):
        return float("inf")
    norm = float(expected.norm())
    return float((found - expected).norm()) / (norm or 1.0)


def within(difference: float, bound: float, **more: Any) -> Row:
    """Row figures of a check: it holds if `difference` is at most `bound`."""
    return {"difference": difference, "bound": bound, **more}


def backward_results(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 1
) -> list[Tensor]:
    """The output of a function and the gradients of its inputs, for the same upstream gradient at every call."""
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    grads = torch.autograd.grad(out, [x for x in given if x.requires_grad], upstream)
    return [out.detach(), *grads]


def furthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `apart` of several tensors."""
    return max(apart(a, b) for a, b in zip(found, expected, strict=True))
