"""Every stage, told to end or killed, at three moments: nothing half-written, and the same command works then.

The process ends itself when it enters a named function, so the moment is exact. It is forked from this one, which has
the libraries imported; that takes a fraction of a second instead of several.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llmctl.train.trainers  # noqa: F401  (imported here, once for all children)
from llmctl.cli.main import main
from llmctl.cli.markdown import Page  # noqa: F401
from llmctl.runs import read_manifest, status_of
from tests.stages.conftest import FEW, TRAIN

FEW_STEPS = [word for word in FEW if not word.startswith("train.sample")]
COMPARED = ["compare.max_rows=2", "compare.answers=1", "compare.max_new_tokens=4", "compare.max_length=32"]
FINISH = "llmctl.runs.Run.finish"
TORCH_SAVE = "llmctl.train.checkpoint.torch.save"
SIGNALS = ("SIGTERM", "SIGINT", "SIGKILL")
MOMENTS = ("early", "writing", "late")


@dataclass(frozen=True)
class Stage:
    """A command line, and the functions that it is in at each moment.

    Attributes:
        result: a file that is there at the end; None for a command that leaves none.
    """

    words: list[str]
    early: str
    writing: str
    late: str = FINISH
    result: str | None = "model.safetensors"


STAGES = {
    "tokenizer": Stage(
        ["tokenizer", "train", "data.jsonl", "--vocab-size", "290", "--out", "out"],
        "llmctl.stages.tokenizer.train_tokenizer", "llmctl.stages.tokenizer.stop_ids", result="tokenizer.json",
    ),
    "pretrain": Stage(
        [*TRAIN, "train.max_steps=4", "train.save_steps=2", "--out", "out", "--resume"],
        "llmctl.stages.pretrain.check_out", TORCH_SAVE,
    ),
    "sft": Stage(
        ["sft", "base", "--data", "talks.jsonl", *FEW_STEPS, "train.max_steps=4", "--out", "out", "--resume"],
        "llmctl.stages.sft.prepare_base", TORCH_SAVE, result="adapter_model.safetensors",
    ),
    "reward": Stage(
        ["reward", "base", "--data", "prefs.jsonl", *FEW_STEPS, "train.max_steps=4", "--out", "out", "--resume"],
        "llmctl.stages.preference.prepare_base", TORCH_SAVE, result="adapter_model.safetensors",
    ),
    "dpo": Stage(
        ["dpo", "base", "--data", "prefs.jsonl", *FEW_STEPS, "train.max_steps=4", "--out", "out", "--resume"],
        "llmctl.stages.preference.prepare_base", TORCH_SAVE, result="adapter_model.safetensors",
    ),
    "merge": Stage(
        ["merge", "adapter", *COMPARED, "compare.min_effect=0", "compare.min_top1=0", "compare.max_kl=9", "--out", "out"],
        "llmctl.stages.merge.use_threads", "llmctl.stages.merge.save_model",
    ),
    "convert": Stage(
        ["convert", "base", "--out", "out"], "llmctl.stages.convert.load_model", "llmctl.stages.convert.save_model",
    ),
    "quantize": Stage(
        ["quantize", "base", "--eval-data", "data.jsonl", *COMPARED, "compare.speed_tokens=8", "compare.min_top1=0",
         "compare.max_kl=9", "--out", "out"],
        "llmctl.stages.quantize.use_threads", "llmctl.stages.quantize.save_quantized",
    ),
    "eval": Stage(
        ["eval", "base", "--data", "data.jsonl"],
        "llmctl.stages.evaluate.use_threads", "llmctl.data.shards._build", "llmctl.cli.stages.print_listing", None,
    ),
    "compare": Stage(
        ["compare", "base", "base", "--data", "talks.jsonl", *COMPARED],
        "llmctl.stages.compare.use_threads", "llmctl.stages.compare.parity", "llmctl.cli.tune.print_listing", None,
    ),
    "score": Stage(
        ["score", "scorer", "--data", "prefs.jsonl"],
        "llmctl.stages.score.use_threads", "llmctl.stages.score.scores", "llmctl.cli.tune.print_listing", None,
    ),
    "generate": Stage(
        ["generate", "base", "Anna", "--ignore-eos", "--max-new-tokens", "4"],
        "llmctl.stages.generate.use_threads", "llmctl.stages.generate.generate", "llmctl.cli.stages.echo", None,
    ),
}  # fmt: skip


def die_in(function: str, number: int) -> None:
    """Let the process send itself a signal at the end of the first call of a function."""
    where, _, name = function.rpartition(".")
    owner = _found(where)
    usual: Callable[..., Any] = getattr(owner, name)

    def ended(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, usual)
        made = usual(*args, **kwargs)
        os.kill(os.getpid(), number)
        return made

    setattr(owner, name, ended)


def _found(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        above, _, name = path.rpartition(".")
        return getattr(_found(above), name)


def forked(words: list[str], prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run a command line in a child: its exit code (minus the signal that killed it), and what it wrote."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open("written.txt", "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if prepare is not None:
                prepare()
            main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), Path("written.txt").read_text()


@pytest.fixture
def stock(talking: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`talking` with preferences, and a reward model `scorer` where it is needed."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rows = [{"prompt": str(i), "chosen": "good", "rejected": "bad" + "!" * (i % 3)} for i in range(12)]
    (talking / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return talking


def whole(out: Path) -> None:
    """Assert that no file in place is half-written: every JSON is one, every safetensors file is as long as it says."""
    for file in out.rglob("*"):
        if any(part.startswith(".tmp-") for part in file.relative_to(out).parts):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            raw = file.read_bytes()
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
            assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + max(ends)


def end_and_run_again(stage: str, moment: str, kind: str, here: Path) -> None:
    about, number = STAGES[stage], getattr(signal, kind)
    if stage == "score":
        reward = [word for word in STAGES["reward"].words if word not in ("--resume",)]
        assert forked([*reward[:-1], "scorer"])[0] == 0
    before = {path.name for path in here.iterdir()}
    code, said = forked(about.words, lambda: die_in(getattr(about, moment), number))
    out = here / "out"
    if kind == "SIGKILL":
        assert code == -signal.SIGKILL, said
    else:
        assert code == 130 and "interrupted" in said and "error:" not in said, said
        assert not list(here.rglob(".tmp-*")) and not list(here.parent.rglob(".tmp-*"))
        assert not out.is_dir() or not (out / "run.lock").exists()
    if (out / "run.json").is_file():
        ended = "crashed" if kind == "SIGKILL" else "interrupted"
        finished = moment == "late" and about.late == FINISH  # what is done stays done
        assert status_of(out, read_manifest(out)) == ("done" if finished else ended)
    whole(out)
    if moment == "late" and about.result is not None and about.late == FINISH:
        assert (out / about.result).is_file()
        if "--resume" not in about.words:
            return  # there is nothing to do again
    code, said = forked(about.words)
    assert code == 0, said
    assert not list(here.rglob(".tmp-*")) and not list(here.parent.rglob(".tmp-*"))
    if about.result is not None:
        assert read_manifest(out)["status"] == "done" and (out / about.result).is_file()
        whole(out)
    left = {path.name for path in here.iterdir()} - before - {"written.txt", "out"}
    assert not left


@pytest.mark.parametrize("stage", ["merge", "convert", "tokenizer", "sft", "eval"])
def test_told_to_end_while_it_writes(stage: str, stock: Path) -> None:
    end_and_run_again(stage, "writing", "SIGTERM", stock)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_ended_at_any_moment(stage: str, moment: str, kind: str, stock: Path) -> None:
    end_and_run_again(stage, moment, kind, stock)
