"""An SFT run with dropped inputs and early stopping, killed at any moment or out of disk, ends as if it had not been."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.model.adapters import ADAPTER_WEIGHTS
from llmctl.model.open import open_model
from llmctl.runs import read_manifest
from llmctl.stages import sft
from llmctl.train.checkpoint import checkpoints
from tests.program import Program
from tests.stages import killing
from tests.stages.bad_input import WEIGHTS, Bad, told
from tests.stages.conftest import TUNE
from tests.stages.killing import KILLS, die_inside, kill_at_random, newest, survived

STEPS = 40
RUN = [
    *TUNE,
    "lora.dropout=0.2",
    "data.eval_fraction=0.2",
    "train.save_steps=1",
    "train.save_total_limit=3",
    "train.eval_steps=2",
    "train.early_stopping_patience=4",
    "--resume",
]
# the rate grows until it does harm, so the evaluation loss has a minimum inside the run
STOPS = [*RUN, "train.max_steps=30", "train.learning_rate=1", "train.warmup_ratio=0.95"]
LONG = [*RUN, f"train.max_steps={STEPS}", "train.sample_steps=1", "train.sample_tokens=4"]
FIGURES = ("loss", "eval_loss", "eval_perplexity", "best_step", "steps", "tokens")


def assert_same(run: Path, whole: Path) -> None:
    """Assert that a run ended as the uninterrupted one did, samples and all."""
    killing.assert_same(run, whole, ADAPTER_WEIGHTS, FIGURES)
    samples = [(folder / "samples.jsonl").read_text() for folder in (run, whole)]
    assert samples[0] == samples[1]
    open_model(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["--lora", "--qlora"])
def test_killed_at_ten_random_moments(method: str, talking: Path, llmctl: Program) -> None:
    words = [*LONG, method, "train.early_stopping_patience=100"]
    assert llmctl(*words, "--out", "whole").code == 0
    out = talking / "out"
    reached = kill_at_random([*words, "--out", "out"], out, seed=1)
    assert reached[0] > 0 and reached == sorted(reached) and reached[-1] < STEPS, reached
    outcome = llmctl(*words, "--out", "out")
    assert outcome.code == 0 and f"of {STEPS}\n" in outcome.err, outcome.err
    assert_same(out, talking / "whole")
    assert len(read_manifest(out)["resumed"]) >= KILLS - 3


FAULTS = killing.FAULTS | {
    "half of the adapter": "import peft.peft_model\nat(peft.peft_model, 'safe_save_file', lambda what, path: step(path), half)",
    "half of the best weights": (
        "import peft.peft_model\n"
        "at(peft.peft_model, 'safe_save_file', lambda what, path: 'tmp-best' in str(path), half)"
    ),
    "the best weights taken away, the better ones not there yet": (
        "at(os, 'replace', lambda old, new: Path(new) == Path('out/best') and 'old' not in str(old) "
        "and not Path('out/best').exists() and Path('out/checkpoints/step-000003').exists(), nothing)"
    ),
    "the best weights back, and not in place yet": (
        "import llmctl.stages.sft\n"
        "at(llmctl.stages.sft, 'install', lambda save, out: True, nothing)"
    ),
    "all in place, and not done yet": (
        "at(os, 'replace', lambda old, new: Path(new).name == 'report.html', nothing)"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_killed_inside_a_write(fault: str, talking: Path, llmctl: Program) -> None:
    """The run stops early, a few steps after its best, whose weights are no longer among the checkpoints."""
    words = STOPS
    assert llmctl(*words, "--out", "whole").code == 0
    metrics = read_manifest(talking / "whole")["metrics"]
    assert 7 < metrics["steps"] < 30 and metrics["best_step"] < metrics["steps"] - 3, metrics
    die_inside([*words, "--out", "out"], FAULTS[fault])
    out = talking / "out"
    survived(out)
    assert newest(out) >= 1
    outcome = llmctl(*words, "--out", "out")
    assert outcome.code == 0 and "resuming from step " in outcome.err, outcome.err
    assert_same(out, talking / "whole")


# --- here, without a process of its own --------------------------------------------------------------


def crash(run: Path, step: int, weights: str) -> None:
    """Make a finished run look as if its process had been killed after a checkpoint, before the next."""
    for name in (weights, "report.html", "tokenizer.json"):
        (run / name).unlink()
    for path in checkpoints(run):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    manifest = read_manifest(run)
    for name in ("finished", "outputs", "hash", "metrics", "error"):
        del manifest[name]
    (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}))


METHODS = {
    "lora": ["lora.dropout=0.2"],
    "qlora": ["--qlora", "lora.dropout=0.2"],
    "full": ["--full", "lora.r=16"],
}


@pytest.mark.parametrize("method", METHODS)
def test_resume_from_the_middle(method: str, talking: Path, llmctl: Program) -> None:
    words = [*TUNE, *METHODS[method], "train.save_steps=2", "train.save_total_limit=9", "--out", "out"]
    assert llmctl(*words).code == 0
    out, weights = talking / "out", WEIGHTS if method == "full" else ADAPTER_WEIGHTS
    expected, metrics = (out / weights).read_bytes(), read_manifest(out)["metrics"]
    crash(out, 2, weights)
    outcome = llmctl("sft", "--out", "out", "--resume")
    assert outcome.code == 0 and "resuming from step 2 of 6\n" in outcome.err, outcome.err
    assert (out / weights).read_bytes() == expected
    again = read_manifest(out)["metrics"]
    assert all(again[name] == metrics[name] for name in ("loss", "eval_loss", "tokens"))


def test_an_early_stop_is_ended_again(
    talking: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the best weights were back: they are still there, and the figures are theirs."""
    words = [*STOPS, "train.early_stopping_patience=2", "--out", "out"]
    out = talking / "out"
    interrupted, usual = talking / "kept", sft.install

    def copied(save: Callable[[Path], None], where: Path) -> None:
        shutil.copytree(where, interrupted, ignore=shutil.ignore_patterns("run.lock"))
        usual(save, where)

    monkeypatch.setattr(sft, "install", copied)
    outcome = llmctl(*words)
    assert outcome.code == 0, outcome.err
    monkeypatch.setattr(sft, "install", usual)
    metrics = read_manifest(out)["metrics"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    assert best["step"] == metrics["best_step"] < metrics["steps"] < 30
    assert (metrics["eval_loss"], metrics["eval_perplexity"]) == (best["eval_loss"], best["eval_perplexity"])
    assert f"stopped at step {metrics['steps']}: the evaluation loss no longer falls\n" in outcome.err
    assert not (out / "best").exists() and (interrupted / "best" / ADAPTER_WEIGHTS).exists()
    assert read_manifest(interrupted)["status"] == "running"
    again = llmctl("sft", "--out", "kept", "--resume")
    assert again.code == 0, again.err
    assert (interrupted / ADAPTER_WEIGHTS).read_bytes() == (out / ADAPTER_WEIGHTS).read_bytes()
    assert read_manifest(interrupted)["metrics"] == metrics


# --- a disk that fills up during a save --------------------------------------------------------------

FULL = "free some space and run the same command again; a run that had begun goes on with --resume"


def test_a_disk_that_fills_up(small_disk: Path, talking: Path, llmctl: Program) -> None:
    """Checkpoints of about 150 kB, all kept, on a disk of 1 MB."""
    words = [*TUNE, "lora.r=16", "lora.dropout=0.2", "train.max_steps=12", "train.save_steps=1"]
    words += ["train.save_total_limit=50"]
    assert llmctl(*words, "--out", "whole").code == 0
    whole, out = talking / "whole", small_disk / "out"
    outcome = llmctl(*words, "--out", str(out))
    kept = checkpoints(out)
    assert 1 < len(kept) < 12
    told(outcome, Bad("", f"{out}/checkpoints/step-{len(kept) + 1:06d}: the disk is full", FULL))
    assert sorted((out / "checkpoints").iterdir()) == kept  # of the one that did not fit nothing is left
    for path in kept:
        other = whole / "checkpoints" / path.name / ADAPTER_WEIGHTS
        assert (path / ADAPTER_WEIGHTS).read_bytes() == other.read_bytes()
    assert read_manifest(out)["status"] == "failed" and not (out / ADAPTER_WEIGHTS).exists()
    still = llmctl(*words, "--out", str(out), "--resume")  # no space was freed: nothing gets worse
    assert still.code == 1 and still.err.splitlines()[-2].endswith(": the disk is full")
    assert checkpoints(out) == kept
    for path in kept[:-1]:
        shutil.rmtree(path)
    again = llmctl("sft", "--out", str(out), "--resume", "train.save_total_limit=1")
    assert again.code == 0 and f"resuming from step {len(kept)} of 12\n" in again.err, again.err
    assert (out / ADAPTER_WEIGHTS).read_bytes() == (whole / ADAPTER_WEIGHTS).read_bytes()
    assert read_manifest(out)["status"] == "done"
