"""The number of threads that torch computes with on a CPU: chosen before the start, watched during long work.

torch has one such number for the whole process, so one object of the process adapts it, made by `use_threads`. Code that
does long work reports it through `count_work`, `timed` or `timed_batches`; without `use_threads`, or with a fixed
number, these do nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmctl.kernels.cores import Cores, read_cores, read_usage, used_by_others
from llmctl.kernels.thread_control import Change, ThreadController
from llmctl.recipe.train import Threads
from llmctl.talk import Talk

LOOK = 0.1  # seconds for which the use of the cores is watched before the start
WINDOW = 1.0  # seconds of work that make one measurement of throughput
BOUND = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Choice:
    """A number of threads for this machine at this moment.

    Attributes:
        threads: to begin with.
        most: what may be tried later.
        why: what bounds the number, as `llmctl doctor` shows it.
        busy: cores that other programs keep busy, if that made `threads` smaller; else 0.
    """

    threads: int
    most: int
    why: str
    busy: int = 0


def choose_threads(cores: Cores, used: float, bound: int | None = None) -> Choice:
    """One thread for each usable core that other programs leave idle.

    Args:
        used: cores' worth of the allowed processors that other programs use.
        bound: what OMP_NUM_THREADS allows, if it is set.
    """
    most = cores.usable if bound is None else max(1, min(cores.usable, bound))
    free = max(1, cores.physical - round(used))
    threads = min(most, free)
    why = [f"{cores.physical} {'core' if cores.physical == 1 else 'cores'}"]
    if len(cores.allowed) < cores.online:
        why.append(f"CPU affinity allows {len(cores.allowed)} of {cores.online} processors")
    elif len(cores.allowed) > cores.physical:
        why.append(f"{len(cores.allowed)} hyperthreads")
    if cores.quota is not None:
        why.append(f"the cgroup's quota is {cores.quota:.3g}")
    if bound is not None:
        why.append(f"{BOUND} is {bound}")
    if round(used):
        why.append(f"other programs keep {round(used)} busy")
    return Choice(threads, most, ", ".join(why), round(used) if threads < most else 0)


def look(seconds: float = LOOK) -> Choice:
    """The choice for this machine as it is now; watches the cores for a moment if there is a choice."""
    cores, bound = read_cores(), _bound()
    if choose_threads(cores, 0.0, bound).most == 1:
        return choose_threads(cores, 0.0, bound)
    before = read_usage()
    time.sleep(seconds)
    return choose_threads(cores, used_by_others(before, read_usage(), cores.allowed), bound)


def _bound() -> int | None:
    """What OMP_NUM_THREADS says, as OpenMP reads it: the first of a list; None if it is no positive number."""
    first = os.environ.get(BOUND, "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) > 0 else None


def use_threads(
    setting: Threads, field: str, device: torch.device, talk: Talk, *, fixed: bool = False
) -> None:
    """Set the number of threads for what follows.

    Args:
        setting: a number, which nothing changes; or `auto`, which is chosen now and may change in long work.
        field: what the recipe calls it.
        device: where the work is done; threads are watched on a CPU only.
        fixed: choose once, as where a change would compile everything anew.
    """
    _watching.clear()
    if setting != "auto":
        allowed = len(read_cores().allowed)
        if setting > allowed:
            talk.say(
                f"{field} is {setting}, but this process may use {allowed} processors: threads will wait for each other"
            )
        torch.set_num_threads(setting)
        return
    choice = look()
    torch.set_num_threads(choice.threads)
    if device.type != "cpu":
        return
    if choice.busy:
        of = f"{choice.threads} of {choice.most} threads"
        talk.say(f"computing with {of}: other programs keep {choice.busy} of the cores busy")
    if choice.most > 1 and not fixed:
        _watching.append(_Watch(choice, talk))


# --- during long work -------------------------------------------------------------------------------


class Work(NamedTuple):
    """A kind of work whose throughput is comparable.

    Args:
        name, unit: for people: "decoding", "tokens".
        key: tells work of the same name apart, such as that of two models.
    """

    name: str
    unit: str
    key: Hashable = None


class _Watch:
    """Measures throughput by the window, and sets the number of threads that the controller chooses."""

    def __init__(self, choice: Choice, talk: Talk) -> None:
        self._controller = ThreadController(choice.threads, choice.most)
        self._cores, self._talk = read_cores(), talk
        self._usage = read_usage()
        self._sums: dict[
            Work, tuple[float, float]
        ] = {}  # units and seconds of the window that is not yet full
        self._has_said = False

    def add(self, work: Work, units: float, seconds: float) -> None:
        """Add work to the current window; a full window goes to the controller."""
        if not self._sums and time.monotonic() - self._usage.clock > seconds + WINDOW:
            self._usage = read_usage()  # after a pause, which says nothing of now
        done, spent = self._sums.get(work, (0.0, 0.0))
        done, spent = done + units, spent + seconds
        self._sums[work] = (done, spent)
        if spent < WINDOW or not done:
            return
        usage = read_usage()
        free = self._cores.physical - used_by_others(self._usage, usage, self._cores.allowed)
        self._usage = usage
        self._sums.clear()
        change = self._controller.record(work, done / spent, free)
        if self._controller.threads != torch.get_num_threads():
            torch.set_num_threads(self._controller.threads)
        if change is not None:
            self._say(change, work)

    def _say(self, change: Change, work: Work) -> None:
        if change.after > change.before or self._has_said:
            return
        self._has_said = True
        self._talk.say(
            f"{work.name}: {change.rate_before:,.3g} {work.unit}/s on {change.before} threads, "
            f"{change.rate_after:,.3g} on {change.after}: going on with {change.after}"
        )


# the watch of this process, if there is one
_watching: list[_Watch] = []


def count_work(work: Work, units: float, seconds: float) -> None:
    """Record that `units` of work took `seconds`; this may change the number of threads."""
    for watch in _watching:
        watch.add(work, units, seconds)


@contextmanager
def timed(work: Work, units: float) -> Iterator[None]:
    """Record the block as `units` of work, unless it raises."""
    started = time.perf_counter()
    yield
    count_work(work, units, time.perf_counter() - started)


def timed_batches(batches: Iterable[Mapping[str, Tensor]], *models: object) -> Iterator[Mapping[str, Tensor]]:
    """Yield the batches, and record the time spent on each until the next is requested, by its tokens."""
    work = Work("evaluation", "tokens", tuple(map(id, models)))
    for batch in batches:
        with timed(work, batch["input_ids"].numel()):
            yield batch


@contextmanager
def steady_threads() -> Iterator[None]:
    """Keep the number of threads while speeds are compared."""
    held = list(_watching)
    _watching.clear()
    try:
        yield
    finally:
        _watching.extend(held)
