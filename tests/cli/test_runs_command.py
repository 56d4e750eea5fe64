"""`llmctl runs`: what there is, and where it came from even after folders were moved."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llmctl.runs import Parent, Run, folder_hash
from tests.program import Program

DAMAGED = (
    "the manifest was damaged; where the weights are whole, the folder without run.json opens as a model"
)


def make_run(path: Path, stage: str, *parents: tuple[str, Path], **metrics: Any) -> Path:
    """A finished run whose one output is its own name."""
    named = [asdict(Parent(role, str(parent), folder_hash(parent))) for role, parent in parents]
    with Run.start(stage, path, f"stage: {stage}\n", parents=named) as run:
        (path / "weights.safetensors").write_text(path.name)
        run.finish(metrics)
    return path


@pytest.fixture
def family(llmctl_: Program) -> Path:
    """runs/tok -> runs/base -> runs/more, as relative paths in the current folder."""
    tok = make_run(Path("runs/tok"), "tokenizer", bytes_per_token=4.2)
    base = make_run(Path("runs/base"), "pretrain", ("tokenizer", tok), bits_per_byte=1.234567, loss=3.0)
    make_run(Path("runs/more"), "pretrain", ("base", base), ("tokenizer", tok), loss=2.0)
    return Path("runs")


def test_list(llmctl_: Program, family: Path) -> None:
    lines = llmctl_("runs", "list").out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["name", "stage", "status"],
        ["base", "pretrain", "done"],
        ["more", "pretrain", "done"],
        ["tok", "tokenizer", "done"],
    ]
    assert lines[1].endswith("bits_per_byte 1.235")
    rows = json.loads(llmctl_("runs", "list", "--dir", "runs", "--json").out)
    assert rows[0]["path"] == "runs/base"
    assert rows[0]["bytes"] == sum(f.stat().st_size for f in Path("runs/base").iterdir())


def test_list_tells_crashed_and_damaged_runs(llmctl_: Program, family: Path) -> None:
    manifest = Path("runs/base/run.json")
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    Path("runs/tok/run.json").write_text("{")
    assert [line.split()[1:3] for line in llmctl_("runs", "list").out.splitlines()[1:]] == [
        ["pretrain", "crashed"],
        ["pretrain", "done"],
        ["-", "damaged"],
    ]


def test_list_of_nothing(llmctl_: Program) -> None:
    assert llmctl_("runs", "list").out == "no runs in runs\n"


@pytest.mark.parametrize("name", ["base", "runs/base"])
def test_show(name: str, llmctl_: Program, family: Path) -> None:
    text = llmctl_("runs", "show", name).out
    assert text.startswith("base (pretrain)\n\nwhat it is\n  folder   runs/base\n  result   language model, ")
    for part in (
        "\n  status   done, 20",
        "\nmade from\n  tokenizer  runs/tok\n",
        "\nhow it went\n  loss           3 (nats per token, in training)\n  bits per byte  1.235\n",
        "\nnext\n  llmctl generate runs/base 'Once upon a time'  let it write\n",
    ):
        assert part in text
    assert "weights.safetensors" not in text, "hashes are for --json"
    shown = json.loads(llmctl_("runs", "show", name, "--json").out)
    assert shown["parents"][0]["role"] == "tokenizer"
    assert shown["metrics"] == {"bits_per_byte": 1.234567, "loss": 3.0}


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("bsae", "bsae: no such run", "did you mean `base`?"),
        ("plain", "plain: not a run folder (no run.json)", "see `llmctl runs list`"),
        (
            "broken",
            "broken/run.json: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
            DAMAGED,
        ),
        ("odd", "odd/run.json: not a manifest", DAMAGED),
    ],
)
def test_show_errors(name: str, message: str, hint: str, llmctl_: Program, family: Path) -> None:
    for folder, text in (("plain", None), ("broken", "{"), ("odd", "[]")):
        Path(folder).mkdir()
        if text is not None:
            Path(folder, "run.json").write_text(text)
    ended = llmctl_("runs", "show", name)
    assert (ended.code, ended.err) == (1, f"error: {message}\nhint: {hint}\n")


def test_lineage(llmctl_: Program, family: Path) -> None:
    assert llmctl_("runs", "lineage", "more").out.splitlines() == [
        "runs/more (pretrain)",
        "├─ base: runs/base (pretrain)",
        "│  └─ tokenizer: runs/tok (tokenizer)",
        "└─ tokenizer: runs/tok (tokenizer)",
    ]


def test_lineage_finds_a_moved_parent_by_its_hash(llmctl_: Program, family: Path) -> None:
    shutil.move("runs/tok", "runs/old/tok-8k")
    # another run took the place and the name of the parent: it is not mistaken for it
    make_run(Path("runs/tok"), "tokenizer")
    Path("runs/tok/weights.safetensors").write_text("something else")
    manifest = json.loads(Path("runs/tok/run.json").read_text())
    Path("runs/tok/run.json").write_text(json.dumps(manifest | {"hash": None}))
    assert llmctl_("runs", "lineage", "base").out.splitlines() == [
        "runs/base (pretrain)",
        "└─ tokenizer: runs/old/tok-8k (tokenizer) moved from runs/tok",
    ]
    tree = json.loads(llmctl_("runs", "lineage", "base", "--json").out)
    assert tree["parents"][0]["was"] == "runs/tok"
    assert tree["parents"][0]["found"] is True


def test_lineage_tells_what_is_missing(llmctl_: Program, family: Path) -> None:
    digest = folder_hash(Path("runs/tok"))
    shutil.rmtree("runs/tok")
    assert llmctl_("runs", "lineage", "base").out.splitlines() == [
        "runs/base (pretrain)",
        f"└─ tokenizer: runs/tok missing: nothing here has its hash {digest[:12]}",
    ]
    assert json.loads(llmctl_("runs", "lineage", "base", "--json").out)["parents"][0]["found"] is False


def test_lineage_through_folders_llmctl_did_not_make(llmctl_: Program) -> None:
    Path("downloaded").mkdir()
    Path("downloaded/config.json").write_text("{}")
    path = make_run(Path("runs/a"), "pretrain", ("base", Path("downloaded")))
    manifest = json.loads((path / "run.json").read_text())
    manifest["parents"].append(asdict(Parent("tokenizer", "some/hub-id", "")))
    manifest["status"] = "interrupted"
    (path / "run.json").write_text(json.dumps(manifest))
    assert llmctl_("runs", "lineage", "a").out.splitlines() == [
        "runs/a (pretrain, interrupted)",
        "├─ base: downloaded",
        "└─ tokenizer: some/hub-id from the hub",
    ]
