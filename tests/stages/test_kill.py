"""Killed at any moment, or out of disk in the middle of a save, a run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmctl.model.checkpoint import load_model
from llmctl.runs import read_manifest, status_of
from llmctl.train.checkpoint import checkpoints
from tests.program import Program
from tests.stages.bad_input import WEIGHTS, Bad, told
from tests.stages.conftest import TRAIN, mounted

STEPS = 60
KILLS = 10
RUN = [*TRAIN, f"train.max_steps={STEPS}", "train.save_steps=1", "train.save_total_limit=3", "--resume"]


def command(*words: str, fault: str | None = None) -> subprocess.Popen[str]:
    """The program in a process of its own, with `fault` run in it first."""
    how = ["-m", "llmctl"] if fault is None else ["-c", f"{PREPARED}\n{fault}\n{BEGIN}"]
    return subprocess.Popen(
        [sys.executable, *how, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def newest(run: Path) -> int:
    """The step of the newest checkpoint, by name; 0 without one."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name.removeprefix("step-")) for name in names if name.startswith("step-")), default=0)


def survived(run: Path) -> None:
    """Assert that a killed run is known as such, and that its last checkpoint can be used."""
    if not (run / "run.json").is_file():
        return  # killed before it began
    assert status_of(run, read_manifest(run)) == "crashed"
    assert not (run / "run.lock").is_file() or json.loads((run / "run.lock").read_text())["pid"]
    for path in checkpoints(run)[-1:]:
        load_model(path)


@pytest.fixture
def whole(stocked: Path, llmctl: Program) -> Path:
    """The run that nothing interrupted."""
    assert llmctl(*RUN, "--out", "whole").code == 0
    return stocked / "whole"


def assert_same(run: Path, whole: Path) -> None:
    """Assert that a run ended as the uninterrupted one did, bit for bit, and left no scraps."""
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    manifest, other = read_manifest(run), read_manifest(whole)
    assert (manifest["status"], manifest["hash"]) == ("done", other["hash"])
    kept = ("loss", "eval_bits_per_byte", "steps", "tokens")
    assert [manifest["metrics"][name] for name in kept] == [other["metrics"][name] for name in kept]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, other["metrics"]["steps"] + 1))
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    ends = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (run, whole)]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_killed_at_ten_random_moments(stocked: Path, whole: Path, llmctl: Program) -> None:
    """Three times while it starts or loads, else some steps on, at a moment between two checkpoints."""
    out, moments = stocked / "out", random.Random(0)
    starting, reached = 2.0, []
    while len(reached) < KILLS:
        began, before = time.monotonic(), newest(out)
        process = command(*RUN, "--out", "out")
        if len(reached) in (3, 5, 8):
            time.sleep(moments.uniform(0.5, 1.2) * starting)
        else:
            until = before + moments.randint(1, 4)
            while newest(out) == before and process.poll() is None:
                time.sleep(0.001)
            starting = time.monotonic() - began
            while newest(out) < until and process.poll() is None:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
        reached.append(newest(out))
        survived(out)
    assert reached[0] > 0 and reached == sorted(reached) and reached[-1] < STEPS, reached
    outcome = llmctl(*RUN, "--out", "out")
    assert outcome.code == 0 and f"of {STEPS}\n" in outcome.err, outcome.err
    assert_same(out, whole)
    assert len(read_manifest(out)["resumed"]) >= KILLS - 3


# What a fault is written with. `at` runs `fatal` instead of the call of a function for which `when`
# holds, and then the process dies as by kill -9: nothing is flushed, closed or cleaned up.
PREPARED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
import transformers.modeling_utils
import llmctl.files, llmctl.train.checkpoint

def at(owner, name, when, fatal):
    usual = getattr(owner, name)
    def replaced(*args, **kwargs):
        if when(*args):
            fatal(usual, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*args, **kwargs)
    setattr(owner, name, replaced)

def nothing(usual, *args, **kwargs):
    pass

def half(usual, what, path, **kwargs):
    usual(what, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)

def some(usual, folder, **kwargs):
    os.unlink(Path(folder) / "model.safetensors")

def step(path):
    return ".tmp-step-000007-" in str(path)
"""
BEGIN = """
from llmctl.cli.main import main
main(sys.argv[1:])
"""
FAULTS = {
    "half of the weights": "at(transformers.modeling_utils, 'safe_save_file', lambda what, path: step(path), half)",
    "half of the optimizer": "at(torch, 'save', lambda what, path: step(path) and 'optimizer' in str(path), half)",
    "before the rename": "at(os, 'replace', lambda old, new: step(old), nothing)",
    "after the rename, before it is synced": (
        "at(llmctl.files, 'sync_folder', lambda path: (path / 'step-000007').exists(), nothing)"
    ),
    "half of an old checkpoint deleted": (
        "at(shutil, 'rmtree', lambda path, *rest: Path(path).name == 'step-000005', some)"
    ),
    "the manifest not renamed": (
        "at(os, 'replace', lambda old, new: Path(new).name == 'run.json' and Path(new).exists(), nothing)"
    ),
    "half of the finished model in place": (
        "at(os, 'replace', lambda old, new: Path(old) == Path('out/final/model.safetensors'), nothing)"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_killed_inside_a_write(fault: str, stocked: Path, llmctl: Program) -> None:
    words = [*RUN, "train.max_steps=12"]
    assert llmctl(*words, "--out", "whole").code == 0
    process = command(*words, "--out", "out", fault=FAULTS[fault])
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    out = stocked / "out"
    survived(out)
    assert newest(out) >= 5
    outcome = llmctl(*words, "--out", "out")
    assert outcome.code == 0 and "resuming from step " in outcome.err, outcome.err
    assert_same(out, stocked / "whole")


# --- a disk that fills up during a save --------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 64 MB."""
    folder = mounted(tmp_path / "disk", 64)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


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
