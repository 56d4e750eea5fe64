"""How many threads should compute? A controller that decides by measured throughput: figures in, a number out.

Threads that share a product wait for the slowest of them. Where another program takes a core, one thread more can
therefore mean several times less throughput, and where the program ends, one more is a gain again.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

FALL = 0.5  # share of the best throughput below which fewer threads are tried
GAIN_FEWER, GAIN_MORE = 1.1, 1.05  # a trial is kept if it is so many times as fast
ROOM = 0.75  # cores that must be unused by others before one thread more is tried
FIRST_HOLD, LONGEST_HOLD = 8, 512  # measurements between trials that no fall asks for


@dataclass(frozen=True)
class Change:
    """A number of threads that was tried and kept, with the throughput of both."""

    before: int
    after: int
    rate_before: float
    rate_after: float


@dataclass(frozen=True)
class _Trial:
    """Another number of threads for one measurement; `before` and `rate` are what it is compared with."""

    work: Hashable
    before: int
    rate: float

    def is_kept(self, threads: int, rate: float) -> bool:
        return rate > self.rate * (GAIN_FEWER if threads < self.before else GAIN_MORE)


class ThreadController:
    """Starts with some number of threads, and tries another when the figures ask for it.

    Fewer are tried when the throughput of some work falls below `FALL` of its best, and where there are more threads
    than other programs leave cores. More are tried, never above `most`, when other programs leave a core unused. What
    is faster is kept. Between trials without a fall there is a wait, which doubles unless more threads were kept, so
    that a core which is taken every other minute does not make the number flap.

    Attributes:
        threads: how many to compute with until the next measurement.
    """

    def __init__(self, threads: int, most: int) -> None:
        self.threads, self._most = threads, most
        self._best: dict[Hashable, float] = {}
        self._trial: _Trial | None = None
        self._hold = FIRST_HOLD
        self._waited = 0
        self._has_tried = False

    def record(self, work: Hashable, rate: float, free: float | None = None) -> Change | None:
        """Take a measurement made with `threads` threads, and set `threads` anew.

        Args:
            work: what was computed; rates of different work are not compared.
            rate: throughput, in a unit of that work.
            free: cores that other programs left unused meanwhile, those this program used included; None if
                unknown: then a fall alone leads to a trial.

        Returns the change if a trial has ended well.
        """
        trial, self._trial = self._trial, None
        if trial is not None:
            return self._end(trial, work, rate)
        self._waited += 1
        best = self._best[work] = max(rate, self._best.get(work, 0.0))
        has_waited = self._waited >= self._hold
        crowded = free is not None and round(free) < self.threads
        if self.threads > 1 and (rate < best * FALL or (crowded and (has_waited or not self._has_tried))):
            self._try(self._fewer(free), work, rate)
        elif (
            free is not None and has_waited and (more := min(self._most, int(free + 1 - ROOM))) > self.threads
        ):
            self._try(more, work, rate)
        return None

    def _fewer(self, free: float | None) -> int:
        """As many as there are cores left; half, where nobody is seen to use the others."""
        left = self.threads if free is None else round(free)
        return max(1, left if left < self.threads else self.threads // 2)

    def _try(self, threads: int, work: Hashable, rate: float) -> None:
        self._has_tried = True
        self._trial = _Trial(work, self.threads, rate)
        self.threads = threads

    def _end(self, trial: _Trial, work: Hashable, rate: float) -> Change | None:
        tried = self.threads
        if work != trial.work:  # that work has ended: nothing to compare
            self.threads = trial.before
            return None
        self._waited = 0
        kept, more = trial.is_kept(tried, rate), tried > trial.before
        if not (kept and more):
            self._hold = min(LONGEST_HOLD, 2 * self._hold)
        if kept:
            self._best[work] = max(rate, self._best[work])
            return Change(trial.before, tried, trial.rate, rate)
        if not more:  # the number of threads was not the reason: the next fall is measured from here
            self._best[work] = max(rate, trial.rate)
        self.threads = trial.before
        return None
