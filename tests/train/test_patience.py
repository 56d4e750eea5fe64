"""Early stopping and samples on the way: the same after a kill as without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.runs import SAMPLES
from llmctl.talk import SILENT
from llmctl.train.checkpoint import checkpoints
from llmctl.train.loop import Job, train
from llmctl.train.patience import BEST, Patience, forget_best
from tests.said import Said
from tests.train.test_loop import job, rows_of, weights

STEPS, EVERY = 40, 2
# by evaluation; the lowest is the third, and one that equals it does not count as lower
LOSSES = [3.0, 2.5, 2.0, 2.2, 2.0, 2.1, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, *[0.1] * 8]
Weights = list[torch.Tensor]


def watched(
    folder: Path, limit: int | None, losses: list[float] = LOSSES, **settings: Any
) -> tuple[Job, dict]:
    """A job whose evaluations are given by its step, and the weights it has at each of them."""
    made = job(folder, max_steps=STEPS, eval_steps=EVERY, learning_rate=1e-2, **settings)
    made.patience = limit
    seen: dict[int, Weights] = {}
    step, at = made.batches.step, [0]

    def counted(index: int) -> Any:
        at[0] = index + 1
        return step(index)

    def evaluate() -> dict[str, float]:
        seen[at[0]] = weights(made.model)
        loss = losses[at[0] // EVERY - 1]
        return {"loss": loss, "perplexity": 2**loss}

    made.batches.step, made.evaluate = counted, evaluate
    return made, seen


def killed(made: Job, at: int) -> None:
    """Run until step `at` (from 0) is asked for."""
    step = made.batches.step

    def power_cut(index: int) -> Any:
        if index == at:
            raise RuntimeError("power cut")
        return step(index)

    made.batches.step = power_cut
    with pytest.raises(RuntimeError, match="power cut"):
        train(made, SILENT)


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def figures(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if "second" not in name}


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [figures(row) for row in rows]


# --- where it stops, and with what --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "stops", "best"), [(1, 8, 6), (2, 10, 6), (3, 12, 6), (4, 32, 24), (9, 40, 24)]
)
def test_it_stops_after_so_many_evaluations_without_a_lower_loss(tmp_path, limit, stops, best):
    made, seen = watched(tmp_path / "a", limit)
    talk = Said()
    found = train(made, talk)
    assert (found["steps"], found["best_step"]) == (stops, best)
    assert (
        found["eval_loss"] == LOSSES[best // EVERY - 1]
        and found["eval_perplexity"] == 2 ** found["eval_loss"]
    )
    assert equal(weights(made.model), seen[best]) and not equal(seen[best], seen[stops])
    assert [row["step"] for row in rows_of(tmp_path / "a") if "eval_loss" in row] == list(
        range(2, stops + 1, 2)
    )
    said = [line for line in talk.lines if line.startswith("stopped")]
    assert said == (
        [f"stopped at step {stops}: the evaluation loss no longer falls"] if stops < STEPS else []
    )
    assert checkpoints(tmp_path / "a")[-1].name == f"step-{stops:06d}"


def test_without_patience_it_goes_on_and_keeps_its_last_weights(tmp_path):
    made, seen = watched(tmp_path / "a", None)
    found = train(made, SILENT)
    assert found["steps"] == STEPS and "best_step" not in found
    assert equal(weights(made.model), seen[STEPS])
    assert not (tmp_path / "a" / BEST).exists()


def test_a_run_that_gets_better_to_its_end_ends_with_its_end(tmp_path):
    made, seen = watched(tmp_path / "a", 1, [1 / n for n in range(1, 21)])
    found = train(made, SILENT)
    assert (found["steps"], found["best_step"]) == (STEPS, STEPS)
    assert equal(weights(made.model), seen[STEPS])


def test_the_best_weights_are_forgotten_when_the_run_is_done(tmp_path):
    made, _ = watched(tmp_path / "a", 1)
    train(made, SILENT)
    (tmp_path / "a" / f".tmp-{BEST}-0123").mkdir()  # of a save that was killed
    assert (tmp_path / "a" / BEST).is_dir()
    forget_best(tmp_path / "a")
    assert not [path for path in (tmp_path / "a").iterdir() if BEST in path.name]
    forget_best(tmp_path / "a")  # nothing there is no error


def test_rows_without_an_evaluation_are_nothing_to_it(tmp_path):
    patience = Patience(1, tmp_path)
    patience.remember({"step": 1, "loss": 1.0})
    assert patience.best is None and not patience.is_out
    assert patience.end(lambda folder: pytest.fail("there is nothing to load")) == {}


# --- killed and resumed -------------------------------------------------------------------------------


@pytest.mark.parametrize("save_steps", [1, 4, 100])
@pytest.mark.parametrize("at", [1, 5, 6, 9, 11])
def test_killed_and_resumed_it_ends_the_same(tmp_path, at, save_steps):
    whole, _ = watched(tmp_path / "whole", 3)
    wanted = train(whole, SILENT)
    killed(watched(tmp_path / "cut", 3, save_steps=save_steps)[0], at)
    again, _ = watched(tmp_path / "cut", 3, save_steps=save_steps)
    assert figures(train(again, SILENT)) == figures(wanted)
    assert (wanted["steps"], wanted["best_step"]) == (12, 6)
    assert equal(weights(again.model), weights(whole.model))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_killed_again_and_again_it_ends_the_same(tmp_path):
    whole, _ = watched(tmp_path / "whole", 2)
    wanted = train(whole, SILENT)
    for at in (3, 3, 6, 7, 9):
        killed(watched(tmp_path / "cut", 2, save_steps=2)[0], at)
    again, _ = watched(tmp_path / "cut", 2, save_steps=2)
    assert figures(train(again, SILENT)) == figures(wanted)
    assert equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("limit", [1, 4])
def test_killed_after_its_last_step_it_ends_again_without_a_step(tmp_path, limit):
    """Stopped early, or at the last step: the process died before the model was put in place."""
    first, _ = watched(tmp_path / "a", limit)
    wanted = train(first, SILENT)
    before = lines(tmp_path / "a")
    again, _ = watched(tmp_path / "a", limit)
    again.batches.step = lambda index: pytest.fail(f"step {index} was taken")
    assert figures(train(again, SILENT)) == figures(wanted)
    assert equal(weights(again.model), weights(first.model))
    assert lines(tmp_path / "a") == before


# --- samples ------------------------------------------------------------------------------------------


def sampled(folder: Path, every: int | None, **settings: Any) -> Job:
    """A job whose answers tell of its weights."""
    made = job(folder, max_steps=12, **settings)
    made.sample_steps = every

    def answers() -> list[dict[str, Any]]:
        assert not made.model.training
        norm = float(made.model.lm_head.weight.detach().norm())
        return [{"prompt": "东?", "answer": f"{norm:.6f}"}, {"prompt": "b", "answer": "b"}]

    made.sample = answers
    return made


@pytest.mark.parametrize(
    ("every", "eval_steps", "steps"),
    [(5, None, [0, 5, 10, 12]), (None, 4, [0, 4, 8, 12]), (100, None, [0, 12]), (6, None, [0, 6, 12])],
)
def test_samples_are_written_at_the_beginning_on_the_way_and_at_the_end(tmp_path, every, eval_steps, steps):
    train(sampled(tmp_path / "a", every, eval_steps=eval_steps), SILENT)
    rows = lines(tmp_path / "a", SAMPLES)
    assert [row["step"] for row in rows] == [step for step in steps for _ in range(2)]
    assert rows[0]["prompt"] == "东?" and "东" in (tmp_path / "a" / SAMPLES).read_text(encoding="utf-8")
    assert len({row["answer"] for row in rows[::2]}) == len(steps)


@pytest.mark.parametrize("at", [0, 4, 5, 11])
@pytest.mark.parametrize("save_steps", [2, 100])
def test_samples_of_a_killed_run_are_cut_and_written_again(tmp_path, at, save_steps):
    train(sampled(tmp_path / "whole", 5), SILENT)
    killed(sampled(tmp_path / "cut", 5, save_steps=save_steps), at)
    with open(tmp_path / "cut" / SAMPLES, "a") as file:
        file.write('{"step": 5, "pro')
    train(sampled(tmp_path / "cut", 5, save_steps=save_steps), SILENT)
    assert lines(tmp_path / "cut", SAMPLES) == lines(tmp_path / "whole", SAMPLES)


def test_samples_change_nothing_of_the_run(tmp_path):
    with_samples, without = sampled(tmp_path / "a", 1), job(tmp_path / "b", max_steps=12)
    train(with_samples, SILENT)
    train(without, SILENT)
    assert equal(weights(with_samples.model), weights(without.model))
    assert not (tmp_path / "b" / SAMPLES).exists()


def test_an_early_stop_ends_with_a_sample(tmp_path):
    made, _ = watched(tmp_path / "a", 1)
    made.sample, made.sample_steps = (lambda: [{"answer": "x"}]), 100
    train(made, SILENT)
    assert [row["step"] for row in lines(tmp_path / "a", SAMPLES)] == [0, 8]
