"""The controller of the number of threads, fed with figures; no clock and no threads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from llmctl.kernels.thread_control import FIRST_HOLD, Change, ThreadController

Machine = Callable[[int], tuple[float, float]]  # threads -> throughput, cores that others leave


def idle(cores: int) -> Machine:
    return lambda threads: (20.0 * min(threads, cores), float(cores))


def spinning(cores: int, busy: int) -> Machine:
    """Threads that spin for each other: collapse as soon as there are more than free cores."""
    free = cores - busy
    return lambda threads: (20.0 * threads if threads <= free else 1.0, float(free))


def run(control: ThreadController, machine: Machine, times: int, work: str = "decoding") -> list[int]:
    """The number of threads before each measurement and after the last."""
    seen = [control.threads]
    for _ in range(times):
        rate, free = machine(control.threads)
        control.record(work, rate, free)
        seen.append(control.threads)
    return seen


def changes(seen: list[int]) -> int:
    return sum(a != b for a, b in pairwise(seen))


def test_an_idle_machine_changes_nothing() -> None:
    assert run(ThreadController(2, 2), idle(2), 500) == [2] * 501


@pytest.mark.parametrize(("cores", "busy", "expected"), [(2, 1, 1), (8, 1, 7), (8, 3, 5), (16, 15, 1)])
def test_a_core_that_becomes_busy_is_left(cores: int, busy: int, expected: int) -> None:
    control = ThreadController(cores, cores)
    run(control, idle(cores), 5)
    seen = run(control, spinning(cores, busy), 3)
    # one measurement sees the fall, the next one is the trial
    assert seen == [cores, expected, expected, expected]


def test_the_change_tells_both_rates() -> None:
    control = ThreadController(2, 2)
    assert control.record("decoding", 35.0, 2.0) is None
    assert control.record("decoding", 1.2, 1.1) is None
    assert control.record("decoding", 26.0, 1.0) == Change(2, 1, 1.2, 26.0)


def test_half_of_the_best_is_no_fall() -> None:
    control = ThreadController(2, 2)
    run(control, idle(2), 3)
    assert run(control, lambda threads: (20.0, 2.0), 20) == [2] * 21


def test_a_fall_that_fewer_threads_do_not_mend_is_tried_once() -> None:
    control = ThreadController(4, 4)
    run(control, idle(4), 3)
    slower = run(control, lambda threads: (5.0 * threads, 4.0), 50)  # a longer context, say
    assert slower[:3] == [4, 2, 4] and set(slower[3:]) == {4}


def test_a_core_that_was_busy_before_the_first_measurement_is_left() -> None:
    """Then there is no better throughput to have fallen from."""
    assert run(ThreadController(2, 2), spinning(2, 1), 5) == [2, 1, 1, 1, 1, 1]


def test_threads_that_share_well_are_kept_although_a_core_is_busy() -> None:
    seen = run(ThreadController(2, 2), lambda threads: (20.0 + threads, 1.0), 1000)
    assert seen[:3] == [2, 1, 2] and seen[-1] == 2
    assert seen.count(1) <= 8


def test_unknown_use_tries_half_and_never_more() -> None:
    control = ThreadController(8, 8)
    control.record("decoding", 100.0)
    control.record("decoding", 10.0)
    assert control.threads == 4
    control.record("decoding", 50.0)
    assert control.threads == 4
    for _ in range(100):
        control.record("decoding", 50.0)
    assert control.threads == 4


def test_the_core_is_taken_again_when_it_is_free() -> None:
    control = ThreadController(1, 2)
    seen = run(control, idle(2), FIRST_HOLD + 2)
    assert seen[:FIRST_HOLD] == [1] * FIRST_HOLD and seen[-1] == 2
    assert changes(seen) == 1


def test_no_more_threads_while_the_core_is_busy() -> None:
    assert run(ThreadController(1, 2), spinning(2, 1), 500) == [1] * 501


def test_never_more_than_allowed() -> None:
    assert max(run(ThreadController(2, 2), idle(16), 200)) == 2


def test_more_threads_that_do_not_help_are_tried_ever_more_rarely() -> None:
    control = ThreadController(1, 2)
    seen = run(control, lambda threads: (20.0, 2.0), 1000)  # bound by memory, say
    trials = sum(seen[1:][i] == 2 and before == 1 for i, before in enumerate(seen[:-1]))
    assert seen[-1] == 1 and 3 <= trials <= 8


def test_a_core_that_comes_and_goes_does_not_make_it_flap() -> None:
    control, seen = ThreadController(2, 2), []
    run(control, idle(2), 3)
    for _ in range(50):
        seen += run(control, spinning(2, 1), 10)[:-1]
        seen += run(control, idle(2), 10)[:-1]
    assert changes(seen) < 50 < 4 * 50


def test_rates_of_different_work_are_not_compared() -> None:
    control = ThreadController(2, 2)
    for _ in range(20):
        control.record("training", 5000.0, 2.0)
        control.record("evaluation", 90.0, 2.0)
    assert control.threads == 2


def test_a_trial_that_no_measurement_ends_is_given_up() -> None:
    control = ThreadController(2, 2)
    control.record("decoding", 35.0, 2.0)
    control.record("decoding", 1.0, 1.0)
    assert control.threads == 1
    control.record("evaluation", 500.0, 1.0)
    assert control.threads == 2


def test_one_thread_stays_one() -> None:
    control = ThreadController(1, 1)
    assert [control.record("decoding", rate, 1.0) for rate in (30.0, 1.0, 1.0)] == [None] * 3
    assert control.threads == 1
