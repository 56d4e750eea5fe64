"""Runs that are killed: at any moment from outside, or by a fault planted inside a write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from llmctl.model.open import open_model
from llmctl.runs import read_manifest, status_of
from llmctl.train.checkpoint import checkpoints

KILLS = 10


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
        open_model(path)


def assert_same(run: Path, whole: Path, weights: str, figures: tuple[str, ...]) -> None:
    """Assert that a run ended as the uninterrupted one did, bit for bit, and left no scraps.

    Args:
        weights: the file that holds the result.
        figures: the metrics that must be equal too.
    """
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    manifest, other = read_manifest(run), read_manifest(whole)
    assert (manifest["status"], manifest["hash"]) == ("done", other["hash"])
    assert [manifest["metrics"][name] for name in figures] == [other["metrics"][name] for name in figures]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, other["metrics"]["steps"] + 1))
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    ends = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (run, whole)]
    assert ends[0] == ends[1]


def kill_at_random(words: list[str], out: Path, seed: int) -> list[int]:
    """Start a run KILLS times and kill it: three times while it starts or loads, else some steps on, at a
    moment between two checkpoints.

    Returns the newest checkpoint after each kill.
    """
    moments = random.Random(seed)
    starting, reached = 2.0, []
    while len(reached) < KILLS:
        began, before = time.monotonic(), newest(out)
        process = command(*words)
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
    return reached


def die_inside(words: list[str], fault: str) -> None:
    """Run a command in which a fault was planted, and assert that it died of it."""
    process = command(*words, fault=fault)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err


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
    os.unlink(next(Path(folder).glob("*model.safetensors")))

def step(path):
    return ".tmp-step-000007-" in str(path)
"""
BEGIN = """
from llmctl.cli.main import main
main(sys.argv[1:])
"""
# of any run that makes a checkpoint a step, keeps three, and has more than eight steps
FAULTS = {
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
        "at(os, 'replace', lambda old, new: str(old) == f'out/final/{Path(old).name}' "
        "and str(old).endswith('model.safetensors'), nothing)"
    ),
}
