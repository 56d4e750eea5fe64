"""Recipes, flags, output folders, permissions, full disks and numbers that go bad: what is said and left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.model.checkpoint import load_model
from llmctl.train import loop
from tests.program import Outcome, Program
from tests.stages.bad_input import (
    EXPLAIN,
    NEW,
    WEIGHTS,
    Bad,
    cases,
    check,
    file,
    snapshot,
    told,
)

RECIPES = {
    "unknown key": Bad(
        f"{NEW} train.learning_rat=1",
        "command line: train.learning_rat: unknown key",
        "did you mean `learning_rate`?",
    ),
    "unknown section": Bad(
        f"{NEW} trian.max_steps=1", "command line: trian: unknown key", "did you mean `train`?"
    ),
    "unknown key in a file": Bad(
        f"{NEW} --recipe r.yaml",
        "r.yaml: model.hiden_size: unknown key",
        "did you mean `hidden_size`?",
        file("r.yaml", "stage: pretrain\nmodel:\n  hiden_size: 5\n"),
    ),
    "repeated key": Bad(
        f"{NEW} --recipe r.yaml",
        "r.yaml: line 4: `max_steps` was already set on line 3",
        "keep one of them",
        file("r.yaml", "stage: pretrain\ntrain:\n  max_steps: 5\n  max_steps: 6\n"),
    ),
    "wrong type": Bad(
        f"{NEW} train.max_steps=many",
        "command line: train.max_steps: should be a valid integer, not the text `many`",
        f"{EXPLAIN} train.max_steps",
    ),
    "wrong type in a file": Bad(
        f"{NEW} --recipe r.yaml",
        "r.yaml: data.packing: should be a valid boolean, not the text `on`",
        "write true or false",
        file("r.yaml", "stage: pretrain\ndata: {packing: on}\n"),
    ),
    "wrong type of a flag": Bad(
        f"{NEW} --max-steps many",
        "--max-steps: `many` is not a whole number",
        "see `llmctl pretrain --help`",
        code=2,
    ),
    "no steps": Bad(
        f"{NEW.replace('train.max_steps=12', '')} --max-steps 0",
        "command line: train.max_steps: should be greater than or equal to 1, not 0",
        f"{EXPLAIN} train.max_steps",
    ),
    "fewer than no steps": Bad(
        f"{NEW} train.max_steps=-3",
        "command line: train.max_steps: should be greater than or equal to 1, not -3",
        f"{EXPLAIN} train.max_steps",
    ),
    "not one of the choices": Bad(
        f"{NEW} train.lr_scheduler_type=cosin",
        "command line: train.lr_scheduler_type: `cosin` is not one of `cosine`, `linear`, `constant`, "
        "`warmup_stable_decay`",
        "did you mean `cosine`?",
    ),
    "sizes that do not fit": Bad(
        f"{NEW} model.hidden_size=15",
        "command line: model: hidden_size (15) is not a multiple of num_attention_heads (2); "
        "set head_dim to choose a width",
        f"{EXPLAIN} model",
    ),
    "a family that cannot express it": Bad(
        f"{NEW} model.family=mistral model.qk_norm=true",
        "model.family: `mistral` cannot express qk_norm: True",
        "set model.family to auto, or change that field",
    ),
    "new and old model": Bad(
        f"{NEW} base=base",
        "command line: `model` describes a new model, but `base` continues an existing one; drop one",
        f"{EXPLAIN} every field",
    ),
    "rows longer than the context": Bad(
        f"{NEW} data.max_length=65",
        "command line: data.max_length is 65, but model.max_position_embeddings is 64",
        f"{EXPLAIN} every field",
    ),
    "no such recipe": Bad(
        f"{NEW} --recipe quickstart-pretrai",
        "quickstart-pretrai: no such recipe",
        "did you mean `quickstart-pretrain`?",
    ),
    "recipe is a folder": Bad(
        f"{NEW} --recipe tok", "tok: is a folder, not a recipe file", "name the file inside it"
    ),
    "recipe is not UTF-8": Bad(
        f"{NEW} --recipe r.yaml",
        "r.yaml: not UTF-8 text (byte 7)",
        "save the file as UTF-8",
        file("r.yaml", b"stage: \xe4"),
    ),
    "recipe is not YAML": Bad(
        f"{NEW} --recipe r.yaml",
        "r.yaml: line 2: expected the node content, but found '<stream end>'",
        "check indentation, colons and quotes",
        file("r.yaml", "stage: [\n"),
    ),
    "recipe of another stage": Bad(
        f"{NEW} --recipe r.yaml",
        "r.yaml: this recipe is for stage `eval`, not `pretrain`",
        "run `llmctl eval`",
        file("r.yaml", "stage: eval\n"),
    ),
    "unknown flag": Bad(
        f"{NEW} --tokeniser x", "no such option: --tokeniser", "did you mean `--tokenizer`?", code=2
    ),
    "unknown command": Bad("pretrian", "no such command: pretrian", "did you mean `pretrain`?", code=2),
    "two models": Bad(
        "pretrain base other --data data.jsonl --out out",
        "unexpected argument: other",
        "one MODEL at most; repeat --data for each file, or quote a pattern: --data '*.txt'",
        code=2,
    ),
    "no such device": Bad(
        f"{NEW} --device tpu",
        "command line: device: `tpu` is not one of `auto`, `cpu`, `cuda`, `mps`",
        "did you mean `cpu`?",
    ),
    "float16 on a CPU": Bad(
        f"{NEW} --device cpu --dtype float16",
        "train.dtype: float16 needs loss scaling, which this loop does not do",
        "use bfloat16, float32 or auto",
    ),
}


@cases(RECIPES)
def test_recipe(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


def bare(here: Path) -> None:
    """`hf`: a model folder that no run of ours made."""
    ours = shutil.ignore_patterns("run.json", "recipe.yaml", "checkpoints")
    shutil.copytree(here / "base", here / "hf", ignore=ours)


OUT = {
    "not empty": Bad(
        NEW.replace("--out out", "--out base"),
        "base: the folder is not empty",
        "choose another --out, or add --resume to go on with it",
    ),
    "not empty, tokenizer": Bad(
        "tokenizer train data.jsonl --out base", "base: the folder is not empty", "choose another --out"
    ),
    "is its own parent": Bad(
        "pretrain base --data data.jsonl --out base",
        "base: the folder is not empty",
        "choose another --out, or add --resume to go on with it",
    ),
    "is a file": Bad(
        NEW.replace("--out out", "--out data.jsonl"),
        "data.jsonl: is a file, but --out names a folder",
        "choose another name",
    ),
    "lies in a file": Bad(
        NEW.replace("--out out", "--out data.jsonl/out"),
        "data.jsonl: is a file, so data.jsonl/out cannot be made",
        "choose another --out",
    ),
    "resume without it": Bad(
        NEW.replace("--out out", "--resume"),
        "--resume does not say which run to go on with",
        "name its folder with --out DIR",
        code=2,
    ),
    "resume of another stage": Bad(
        NEW.replace("--out out", "--out tok --resume"),
        "tok/recipe.yaml: this recipe is for stage `tokenizer`, not `pretrain`",
        "run `llmctl tokenizer`",
    ),
    "resume onto a model": Bad(
        f"{NEW.replace('--out out', '--out hf --resume')}",
        "hf: not a run, so there is nothing to resume",
        "choose another --out",
        bare,
    ),
}


@cases(OUT)
def test_out(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


# --- permissions: in a process that may not read and write everything, as root may -------------------

PERMISSIONS = {
    "out": Bad(
        NEW.replace("--out out", "--out locked/out"),
        "locked: no permission to write",
        "choose another folder with --out",
    ),
    "out, tokenizer": Bad(
        "tokenizer train data.jsonl --out locked/out",
        "locked: no permission to write",
        "choose another folder with --out",
    ),
    "data": Bad(
        NEW.replace("data.jsonl", "secret.txt"),
        "secret.txt: no permission to read",
        "ask its owner, or copy it elsewhere",
    ),
    "weights": Bad(
        "generate m Anna",
        "m/model.safetensors: no permission to read",
        "ask its owner, or copy the folder",
    ),
    "config": Bad(
        "eval n --data data.jsonl",
        "n/config.json: no permission to read",
        "ask its owner, or copy the folder",
    ),
    "tokenizer": Bad(
        NEW.replace("--tokenizer tok", "--tokenizer locked-tok"),
        "locked-tok/tokenizer.json: no permission to read",
        "ask its owner, or copy the folder",
    ),
    "recipe": Bad(f"{NEW} --recipe r.yaml", "r.yaml: no permission to read it", "chmod u+r r.yaml"),
    "cache": Bad(
        f"{NEW} data.cache_dir=locked/cache",
        "locked/cache: no permission to write",
        "set data.cache_dir (for eval: eval.cache_dir) to a folder you can write",
    ),
}

SEVERAL = """
import contextlib, io, json, sys
from llmctl.cli.main import main

for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def powerless() -> list[str]:
    """The words before a command that keep even root from passing over permissions."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no `setpriv` to give that up")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]


def test_permissions(stocked: Path) -> None:
    shutil.copytree(stocked / "base", stocked / "m")
    shutil.copytree(stocked / "base", stocked / "n")
    shutil.copytree(stocked / "tok", stocked / "locked-tok")
    (stocked / "locked").mkdir()
    for name in ("secret.txt", "r.yaml"):
        (stocked / name).write_text("text")
    before = snapshot(stocked)
    modes = {
        "locked": 0o500,
        "secret.txt": 0,
        "r.yaml": 0,
        f"m/{WEIGHTS}": 0,
        "n/config.json": 0,
        "locked-tok/tokenizer.json": 0,
    }
    kept = {name: (stocked / name).stat().st_mode for name in modes}
    for name, mode in modes.items():
        (stocked / name).chmod(mode)
    words = json.dumps([bad.words.split() for bad in PERMISSIONS.values()])
    done = subprocess.run(
        [*powerless(), sys.executable, "-c", SEVERAL], input=words, capture_output=True, text=True
    )
    for name, mode in kept.items():
        (stocked / name).chmod(mode)
    assert done.returncode == 0, done.stderr
    outcomes = [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]
    for bad, outcome in zip(PERMISSIONS.values(), outcomes, strict=True):
        told(outcome, bad)
    assert snapshot(stocked) == before


# --- a full disk -------------------------------------------------------------------------------------


def filled(disk: Path, leave: int) -> Path:
    """Fill a disk up to `leave` bytes with a file that can be deleted again."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    path = disk / "filler"
    path.write_bytes(b"\0" * (free - leave))
    return path


FULL = "free some space and run the same command again; a run that had begun goes on with --resume"


@pytest.mark.parametrize(
    ("words", "error", "leave"),
    [
        ("tokenizer train data.jsonl --out {disk}/out", "{disk}/out: the disk is full", 8192),
        (f"{NEW} data.cache_dir={{disk}}/cache", "{disk}/cache/shards/{key}: the disk is full", 16384),
    ],
    ids=["tokenizer", "token shards"],
)
def test_full_disk(
    words: str, error: str, leave: int, stocked: Path, small_disk: Path, llmctl: Program
) -> None:
    """What was begun on the full disk is gone, and so is the run; `test_kill.py` fills one during a run."""
    filler = filled(small_disk, leave)
    before = snapshot(stocked)
    key = json.loads((stocked / "base" / "run.json").read_text())["data"]["train"]["fingerprint"]
    outcome = llmctl(*words.format(disk=small_disk).split())
    told(outcome, Bad(words, error.format(disk=small_disk, key=key), FULL))
    assert snapshot(stocked) == before
    left = [path for path in small_disk.rglob("*") if path.is_file() and path != filler]
    assert [path for path in left if not path.name.startswith(".lock-")] == []


# --- numbers that go bad -----------------------------------------------------------------------------


def lowered(rate: str) -> str:
    """The hint after a divergence."""
    return (
        f"start a new run with a lower train.learning_rate (now {rate}) or a longer train.warmup_ratio; "
        "the rows of this step are in diverged.json"
    )


def test_divergence_keeps_the_last_good_checkpoint(
    stocked: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(stocked)
    # no recipe may ask for a rate that surely diverges in one step
    monkeypatch.setattr(loop, "learning_rate", lambda *_, **__: 1e30)
    outcome = llmctl(*NEW.split(), "train.learning_rate=10", "train.save_steps=1")
    assert outcome.code == 3 and outcome.out == "" and "Traceback" not in outcome.err
    error, hint = outcome.err.splitlines()[-2:]
    assert error.startswith("error: out: step 2: loss is ")
    assert error.endswith("; the last good checkpoint is step-000001")
    assert hint == f"hint: {lowered('10')}"
    kept = stocked / "out" / "checkpoints"
    assert [path.name for path in kept.iterdir()] == ["step-000001"]
    model = load_model(kept / "step-000001")
    assert all(weight.isfinite().all() for weight in model.parameters())
    manifest = json.loads((stocked / "out" / "run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", error.removeprefix("error: "))
    assert json.loads((stocked / "out" / "diverged.json").read_text())["step"] == 2
    assert {name: kind for name, kind in snapshot(stocked).items() if not name.startswith("out")} == before


def test_poisoned_model(stocked: Path, llmctl: Program) -> None:
    """A parent whose weights hold a NaN stops the run at its first step, and is not written to."""
    path = stocked / "base" / WEIGHTS
    found = load_file(path)
    found["model.norm.weight"][0] = torch.nan
    save_file(found, path, metadata={"format": "pt"})
    before = snapshot(stocked / "base")
    words = "pretrain base --data data.jsonl --out out train.threads=1"
    told(
        llmctl(*words.split()),
        Bad(
            words,
            "out: step 1: loss is nan; there is no checkpoint yet",
            lowered("0.001"),
            code=3,
        ),
    )
    assert snapshot(stocked / "base") == before
    assert not (stocked / "out" / WEIGHTS).exists()
