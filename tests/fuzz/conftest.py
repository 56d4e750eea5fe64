"""What holds for every input: it is read or refused with a `UserError`, soon, and in little memory."""

from __future__ import annotations

import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from tests.stages.conftest import base, corpus, tok  # noqa: F401  (fixtures)

SECONDS = 20  # of CPU for one input
ROOM = 3 << 30  # bytes of address space beyond what there is
EXAMPLES = {"default": 1, "slow": 6}  # factors

Fuzz = Callable[[st.SearchStrategy, Callable[[object], object], int], Counter]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes `factor` runs twice: short, and marked slow."""
    if "factor" in metafunc.fixturenames:
        marks = [
            pytest.param(EXAMPLES["default"], id="short"),
            pytest.param(EXAMPLES["slow"], id="long", marks=pytest.mark.slow),
        ]
        metafunc.parametrize("factor", marks)


@pytest.fixture
def fuzz(factor: int) -> Iterator[Fuzz]:
    """fuzz(strategy, read, count): give `read` so many inputs, `factor` times as many in the slow run.

    Returns how many were read, and how many refused. Fails on any error but `UserError`, on one without a hint, on
    more than `SECONDS` of work and more than `ROOM` of memory.
    """

    def run(strategy: st.SearchStrategy, read: Callable[[object], object], count: int) -> Counter:
        ended: Counter = Counter()

        @settings(
            max_examples=count * factor,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # not to make a fault smaller, which may take minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(value=strategy)
        def each(value: object) -> None:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(value)
                ended["read"] += 1
            except UserError as error:
                ended["refused"] += 1
                assert error.message and error.hint, f"no hint: {error.message!r}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)

        each()
        return ended

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s of work")

    before = signal.signal(signal.SIGPROF, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    yield run
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGPROF, before)
