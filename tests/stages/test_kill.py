"""Killed at any moment, or out of disk in the middle of a save, a run goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmctl.model.checkpoint import load_model
from llmctl.runs import read_manifest
from llmctl.train.checkpoint import checkpoints
from tests.program import Program
from tests.stages import killing
from tests.stages.bad_input import WEIGHTS, Bad, told
from tests.stages.conftest import TRAIN
from tests.stages.killing import KILLS, die_inside, kill_at_random, newest, survived

STEPS = 60
RUN = [*TRAIN, f"train.max_steps={STEPS}", "train.save_steps=1", "train.save_total_limit=3", "--resume"]
FIGURES = ("loss", "eval_bits_per_byte", "steps", "tokens")


def assert_same(run: Path, whole: Path) -> None:
    """Assert that a run ended as the uninterrupted one did."""
    killing.assert_same(run, whole, WEIGHTS, FIGURES)


@pytest.fixture
def whole(stocked: Path, llmctl: Program) -> Path:
    """The run that nothing interrupted."""
    assert llmctl(*RUN, "--out", "whole").code == 0
    return stocked / "whole"


@pytest.mark.slow
def test_killed_at_ten_random_moments(stocked: Path, whole: Path, llmctl: Program) -> None:
    out = stocked / "out"
    reached = kill_at_random([*RUN, "--out", "out"], out, seed=0)
    assert reached[0] > 0 and reached == sorted(reached) and reached[-1] < STEPS, reached
    outcome = llmctl(*RUN, "--out", "out")
    assert outcome.code == 0 and f"of {STEPS}\n" in outcome.err, outcome.err
    assert_same(out, whole)
    assert len(read_manifest(out)["resumed"]) >= KILLS - 3


FAULTS = killing.FAULTS | {
    "half of the weights": "at(transformers.modeling_utils, 'safe_save_file', lambda what, path: step(path), half)",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_killed_inside_a_write(fault: str, stocked: Path, llmctl: Program) -> None:
    words = [*RUN, "train.max_steps=12"]
    assert llmctl(*words, "--out", "whole").code == 0
    die_inside([*words, "--out", "out"], FAULTS[fault])
    out = stocked / "out"
    survived(out)
    assert newest(out) >= 5
    outcome = llmctl(*words, "--out", "out")
    assert outcome.code == 0 and "resuming from step " in outcome.err, outcome.err
    assert_same(out, stocked / "whole")


# --- a disk that fills up during a save --------------------------------------------------------------


LARGER = ["model.hidden_size=128", "model.intermediate_size=384"]
FULL = "free some space and run the same command again; a run that had begun goes on with --resume"


def test_a_disk_that_fills_up(disk: Path, stocked: Path, llmctl: Program) -> None:
    """Checkpoints of 5.5 MB, all kept: the disk takes eleven, and the run has sixteen."""
    words = [*TRAIN, *LARGER, "train.max_steps=16", "train.save_steps=1", "train.save_total_limit=50"]
    assert llmctl(*words, "--out", "whole").code == 0
    whole, out = stocked / "whole", disk / "out"
    outcome = llmctl(*words, "--out", str(out))
    kept = checkpoints(out)
    assert 5 < len(kept) < 16
    told(outcome, Bad("", f"{out}/checkpoints/step-{len(kept) + 1:06d}: the disk is full", FULL))
    assert sorted((out / "checkpoints").iterdir()) == kept  # of the one that did not fit nothing is left
    for path in kept:
        assert (path / WEIGHTS).read_bytes() == (whole / "checkpoints" / path.name / WEIGHTS).read_bytes()
    load_model(kept[-1])
    assert read_manifest(out)["status"] == "failed" and not (out / WEIGHTS).exists()

    still = llmctl(*words, "--out", str(out), "--resume")  # no space was freed: nothing gets worse
    assert still.code == 1 and still.err.splitlines()[-2].endswith(": the disk is full")
    assert checkpoints(out) == kept

    for path in kept[:-1]:
        shutil.rmtree(path)
    again = llmctl("pretrain", "--out", str(out), "--resume", "train.save_total_limit=2")
    assert again.code == 0 and f"resuming from step {len(kept)} of 16\n" in again.err
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    manifest = read_manifest(out)
    assert (manifest["status"], manifest["error"]) == ("done", None)
