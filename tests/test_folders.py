"""A folder, or a name, where a model was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl.errors import UserError
from llmctl.locate import locate
from tests.program import Program

NAME_IT = "name a run folder, a Hugging Face folder or a hub id"


def run(folder: Path, status: str, *files: str, stage: str = "sft") -> None:
    for name in (*files, "run.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"stage": stage, "status": status}))


CASES = {
    "empty": ([], None, "the folder is empty", NAME_IT),
    "tokenizer": (
        ["tokenizer.json"],
        None,
        "is a tokenizer, not a model",
        "`llmctl pretrain --tokenizer {f}` makes a model for it",
    ),
    "shards": (["meta.json", "ids.bin"], None, "holds token shards, not a model", NAME_IT),
    "data": (["a.jsonl"], None, "holds data, not a model", "data is named with --data {f}"),
    "running": (
        ["metrics.jsonl", "checkpoints/step-000002/x", "checkpoints/step-000004/x"],
        "running",
        "the sft run is still running, so it holds no model yet",
        "its newest checkpoint is one: {f}/checkpoints/step-000004; `llmctl sft --resume --out {f}` goes on with it",
    ),
    "interrupted": (
        [],
        "interrupted",
        "the sft run is not finished (interrupted) and has no checkpoint yet",
        "`llmctl sft --resume --out {f}` goes on with it",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_something_else(name: str, tmp_path: Path) -> None:
    files, status, message, hint = CASES[name]
    folder = tmp_path / "f"
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    if status is not None:
        run(folder, status)
    with pytest.raises(UserError) as caught:
        locate(str(folder), [])
    assert caught.value.message == f"{folder}: {message}"
    assert caught.value.hint == hint.format(f=folder)
    (folder / "config.json").write_text("{}")
    assert locate(str(folder), []) == folder
    assert locate(str(folder), [], "tokenizer") == folder


def test_a_name_that_lies_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        locate("base", [])
    assert (caught.value.message, caught.value.hint) == ("base: no such folder", "did you mean `runs/base`?")


@pytest.mark.parametrize("line", ["sft --resume --out nowhere", "pretrain --resume --out nowhere"])
def test_resuming_where_no_run_is(
    line: str, llmctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = llmctl(*line.split())
    assert ended.code == 1
    assert ended.err == (
        "error: nowhere: no run there to go on with\nhint: see `llmctl runs list`, or leave out --resume to begin\n"
    )
