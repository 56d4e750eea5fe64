"""The number of threads of this process: set by a recipe, chosen, and changed by what long work tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmctl.kernels import threads
from llmctl.kernels.cores import Usage, read_cores
from llmctl.kernels.threads import Choice, Work, count_work, look, steady_threads, timed, use_threads
from tests.said import Said

CPU = torch.device("cpu")
DECODING, EVALUATION = Work("decoding", "tokens"), Work("evaluation", "tokens")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    use_threads(before, "threads", CPU, Said())


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have two cores, both free, and whose counters stand still."""
    monkeypatch.setattr(threads, "look", lambda: Choice(2, 2, "2 cores"))
    monkeypatch.setattr(threads, "read_usage", lambda: Usage({}, 0.0, 0.0))


@pytest.mark.usefixtures("two")
def test_work_that_falls_by_more_than_half_gets_fewer_threads_and_says_so_once() -> None:
    said = Said()
    use_threads("auto", "train.threads", CPU, said)
    assert torch.get_num_threads() == 2
    seen = []
    for tokens in (35.0, 35.0, 1.2, 26.0, 26.0):
        for _ in range(4):  # a measurement is a second of work, however often it is told of
            count_work(DECODING, tokens / 4, 0.25)
        seen.append(torch.get_num_threads())
    assert seen == [2, 2, 1, 1, 1]
    assert said.lines == ["decoding: 1.2 tokens/s on 2 threads, 26 on 1: going on with 1"]


@pytest.mark.usefixtures("two")
def test_work_of_different_kinds_is_measured_apart() -> None:
    use_threads("auto", "train.threads", CPU, Said())
    for _ in range(10):
        count_work(DECODING, 5.0, 0.5)
        count_work(EVALUATION, 5000.0, 0.5)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("how", ["a number", "a GPU", "compiled", "steady"])
def test_threads_that_stay(how: str) -> None:
    said = Said()
    setting, device = 2 if how == "a number" else "auto", torch.device("cuda" if how == "a GPU" else "cpu")
    use_threads(setting, "train.threads", device, said, fixed=how == "compiled")
    with steady_threads() if how == "steady" else timed(EVALUATION, 1.0):
        for tokens in (35.0, 1.2, 1.2, 1.2):
            count_work(DECODING, tokens, 1.0)
    assert torch.get_num_threads() == 2 and said.lines == []


@pytest.mark.usefixtures("two")
def test_work_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(threads, "count_work", lambda *about: told.append(about[:2]))
    with timed(DECODING, 7):
        pass
    with pytest.raises(ZeroDivisionError), timed(DECODING, 7):
        raise ZeroDivisionError
    assert told == [(DECODING, 7)]


def test_a_busy_core_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    monkeypatch.setattr(threads, "look", lambda: Choice(1, 2, "2 cores, other programs keep 1 busy", 1))
    use_threads("auto", "eval.threads", CPU, said)
    assert torch.get_num_threads() == 1
    assert said.lines == ["computing with 1 of 2 threads: other programs keep 1 of the cores busy"]


def test_a_number_is_taken_as_it_is() -> None:
    said, allowed = Said(), len(read_cores().allowed)
    use_threads(1, "eval.threads", CPU, said)
    assert torch.get_num_threads() == 1 and said.lines == []
    use_threads(allowed + 1, "eval.threads", CPU, said)
    assert torch.get_num_threads() == allowed + 1
    assert said.lines == [
        f"eval.threads is {allowed + 1}, but this process may use {allowed} processors: threads will wait for each other"
    ]


@pytest.mark.parametrize(
    ("value", "most"), [("1", 1), ("1,4", 1), (" 1 ", 1), ("0", None), ("-2", None), ("x", None)]
)
def test_omp_num_threads_bounds_the_choice(
    value: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    choice = look(0.01)
    assert choice.most == (most or read_cores().usable)
    assert ("OMP_NUM_THREADS is 1" in choice.why) == (most is not None)
