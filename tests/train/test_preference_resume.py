"""A preference run that was stopped goes on as if it had not been: the same weights, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from llmctl.errors import Interrupted, UserError
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlModel
from llmctl.talk import SILENT
from llmctl.train.checkpoint import checkpoints
from llmctl.train.preference import REFERENCE, TRAINER_STATE, PreferenceJob, train_preferences
from tests.train.pairs import FILES, KINDS, job, rows_of, weights

BFLOAT = Compute(torch.device("cpu"), torch.bfloat16)
# two and a half epochs of six steps, in micro-batches of which the last of an epoch is short
STEPS = {"max_steps": 15, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


class PowerCut(RuntimeError):
    """What a test throws into a run."""


def given(folder: Path, kind: str, lora: bool, **settings) -> PreferenceJob:
    """An adapter drops some of its inputs, so that the random state counts too."""
    return job(folder, kind, lora=lora, dropout=0.2 if lora else 0.0, **{**STEPS, **settings})


def cut_at(given: PreferenceJob, step: int, what=None) -> PreferenceJob:
    """The same job; `what` happens in the forward pass of 1-based optimizer step `step`."""
    calls = []

    def count(module, args):
        calls.append(module.training)
        # two micro-batches a step, of which the last of an epoch's six is one
        if module.training and sum(calls) == 11 * ((step - 1) // 6) + 2 * ((step - 1) % 6) + 1:
            (what or power_cut)()

    backbone = next(module for module in given.model.modules() if isinstance(module, LlmctlModel))
    backbone.register_forward_pre_hook(count)
    return given


def power_cut() -> None:
    raise PowerCut


def assert_same(one: PreferenceJob, other: PreferenceJob) -> None:
    """Equal in weights, in every line of metrics but its speed, and in what is left on disk."""
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    lines = [
        [
            {name: value for name, value in row.items() if name != "tokens_per_second"}
            for row in rows_of(folder)
        ]
        for folder in (one.folder, other.folder)
    ]
    assert lines[0] == lines[1]
    names = [[path.name for path in checkpoints(folder)] for folder in (one.folder, other.folder)]
    assert names[0] == names[1]


@pytest.mark.parametrize("step", [1, 4, 7, 10, 15])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal(tmp_path, kind, lora, step):
    whole = given(tmp_path / "whole", kind, lora, save_steps=3)
    end = train_preferences(whole, SILENT)
    with pytest.raises(PowerCut):
        train_preferences(cut_at(given(tmp_path / "cut", kind, lora, save_steps=3), step), SILENT)
    again = given(tmp_path / "cut", kind, lora, save_steps=3)
    found = train_preferences(again, SILENT)
    assert_same(whole, again)
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in end.items() if k not in timed
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_writes_the_same_lines(tmp_path, kind):
    """A line averages four steps, and checkpoints are written in the middle of them."""
    settings = {"save_steps": 3, "logging_steps": 4}
    whole = given(tmp_path / "whole", kind, False, **settings)
    train_preferences(whole, SILENT)
    with pytest.raises(PowerCut):
        train_preferences(cut_at(given(tmp_path / "cut", kind, False, **settings), 11), SILENT)
    again = given(tmp_path / "cut", kind, False, **settings)
    train_preferences(again, SILENT)
    assert_same(whole, again)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal_in_bfloat16(tmp_path, kind):
    whole = replace(given(tmp_path / "whole", kind, True, save_steps=3), compute=BFLOAT)
    train_preferences(whole, SILENT)
    stopped = replace(given(tmp_path / "cut", kind, True, save_steps=3), compute=BFLOAT)
    with pytest.raises(PowerCut):
        train_preferences(cut_at(stopped, 8), SILENT)
    again = replace(given(tmp_path / "cut", kind, True, save_steps=3), compute=BFLOAT)
    train_preferences(again, SILENT)
    assert_same(whole, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_saves_and_resumes_exactly(tmp_path, kind, number):
    whole = given(tmp_path / "whole", kind, False, save_steps=100)
    train_preferences(whole, SILENT)
    stopped = cut_at(
        given(tmp_path / "cut", kind, False, save_steps=100), 5, lambda: os.kill(os.getpid(), number)
    )
    with pytest.raises(Interrupted) as caught:
        train_preferences(stopped, SILENT)
    assert "cut: interrupted at step 5 of 15; the state was saved" in caught.value.message
    assert caught.value.hint == "run the same command with --resume to go on"
    assert caught.value.exit_code == 130
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-000005"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = given(tmp_path / "cut", kind, False, save_steps=100)
    train_preferences(again, SILENT)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert [row["loss"] for row in rows_of(tmp_path / "cut") if "loss" in row] == [
        row["loss"] for row in rows_of(tmp_path / "whole") if "loss" in row
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
from llmctl.talk import SILENT
from llmctl.train.preference import train_preferences
from tests.train.test_preference_resume import given

job = given(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "lora", save_steps=3)
saves = []

def save(folder):
    job.save(folder)
    saves.append(folder)
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

train_preferences(replace(job, save=save), SILENT)
"""


@pytest.mark.parametrize(("kind", "lora"), [("dpo", False), ("reward", True)])
def test_killed_in_a_save(tmp_path, kind, lora):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), kind, "lora" if lora else "full"]
    (tmp_path / "cut").mkdir()
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert any(name.startswith(".tmp-step-000009-") for name in left)
    whole, again = (given(tmp_path / name, kind, lora, save_steps=3) for name in ("whole", "cut"))
    train_preferences(whole, SILENT)
    train_preferences(again, SILENT)
    assert_same(whole, again)
    names = {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert names == {"step-000012", "step-000015"}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("fate", ["kept", "gone", "damaged", "of other rows"])
def test_reference_stays_that_of_the_base(tmp_path, lora, fate):
    whole = given(tmp_path / "whole", "dpo", lora, save_steps=3)
    train_preferences(whole, SILENT)
    with pytest.raises(PowerCut):
        train_preferences(cut_at(given(tmp_path / "cut", "dpo", lora, save_steps=3), 11), SILENT)
    path = tmp_path / "cut" / REFERENCE
    before = torch.load(path)["logps"]
    if fate == "gone":
        path.unlink()
    elif fate == "damaged":
        path.write_bytes(path.read_bytes()[:40])
    elif fate == "of other rows":
        torch.save({"rows": "x", "logps": before + 1}, path)
    again = given(tmp_path / "cut", "dpo", lora, save_steps=3)
    train_preferences(again, SILENT)
    assert torch.equal(torch.load(path)["logps"], before)
    assert_same(whole, again)


def test_reference_is_computed_once(tmp_path):
    """On resume it is read: a mark in the file reaches the loss."""
    given_ = given(tmp_path, "dpo", False, save_steps=3)
    with pytest.raises(PowerCut):
        train_preferences(cut_at(given_, 5), SILENT)
    held = torch.load(tmp_path / REFERENCE)
    held["logps"][:, 0] += 100.0
    torch.save(held, tmp_path / REFERENCE)
    train_preferences(given(tmp_path, "dpo", False, save_steps=3), SILENT)
    assert rows_of(tmp_path)[-1]["eval_chosen_reward"] < -5


def test_killed_between_the_last_step_and_the_end(tmp_path):
    first = train_preferences(given(tmp_path, "reward", False), SILENT)
    again = given(tmp_path, "reward", False)
    found = train_preferences(again, SILENT)
    spent = {"seconds": 0.0}  # the end of the first was not saved
    assert found | spent == first | spent
    assert checkpoints(tmp_path)[-1].name == "step-000015"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_holds_model_and_state(tmp_path, lora):
    train_preferences(given(tmp_path, "reward", lora, max_steps=2), SILENT)
    names = {path.name for path in checkpoints(tmp_path)[-1].iterdir()}
    assert {FILES[lora], "optimizer.pt", "rng.pt", "state.json", TRAINER_STATE} <= names


def test_checkpoint_of_another_model_is_refused(tmp_path):
    train_preferences(given(tmp_path, "reward", False, max_steps=2), SILENT)
    other = replace(given(tmp_path, "reward", True, max_steps=4), load=lambda folder: None)
    with pytest.raises(UserError, match="step-000002: the checkpoint does not fit this run"):
        train_preferences(other, SILENT)


def test_callbacks_are_transformers_own():
    """`on_step_end` and the rest are found by name; a renamed one would silently never be called."""
    from llmctl.train.preference import _Run

    ours = {name for name in vars(_Run) if name.startswith("on_")}
    assert ours and all(name in vars(TrainerCallback) for name in ours)
