"""Run folders that were damaged: each is told with its reason, and none hides another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.cli.runs import sizes_of_runs
from llmctl.runs import Run, find_runs
from tests.cli.test_runs_command import make_run
from tests.program import Program


def entry(name: str, value: object) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return write


def becomes(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(file: Path) -> None:
        file.unlink()
        make(file)

    return replace


def holds(content: str | bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


# what happens to run.json -> what the list says of it
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (becomes(os.mkfifo), "run.json: not a regular file"),
    "loop": (becomes(lambda file: file.symlink_to(file.name)), "run.json: Too many levels of symbolic links"),
    "dangling": (becomes(lambda file: file.symlink_to("nowhere")), "run.json: a link to nothing"),
    "folder": (becomes(Path.mkdir), "run.json: not a regular file"),
    "deep": (holds('{"a":' * 9999), "run.json: nested too deeply"),
    "long": (
        holds('{"seed": ' + "9" * 5000 + "}"),
        "run.json: a whole number",
    ),
    "bytes": (holds(b"\xff"), "run.json: not UTF-8 (byte 0)"),
    "list": (holds("[]"), "run.json: not a manifest"),
    "parents": (entry("parents", 3), "run.json: parents is not a list of objects with role, path and hash"),
    "parent": (entry("parents", [{"role": 1}]), "run.json: parents is not a list of objects"),
    "metrics": (entry("metrics", [1]), "run.json: metrics is not an object"),
    "status": (entry("status", {"a": 1}), "run.json: status is not a text"),
    "updated": (entry("updated", 5), "run.json: updated is not a text"),
    "outputs": (entry("outputs", {"a": 1}), "run.json: outputs is not an object of file names and hashes"),
    "newer": (entry("format", 99), "run.json: of format 99, which is newer than this llmctl"),
}


@pytest.fixture
def damaged(llmctl_: Program) -> Path:
    """A run of every kind of damage, between two sound ones."""
    for name in ("aa", *DAMAGE, "zz"):
        make_run(Path("runs", name), "pretrain", loss=2.0)
        if name in DAMAGE:
            DAMAGE[name][0](Path("runs", name, "run.json"))
    return Path("runs")


def test_every_damaged_run_is_listed_with_its_reason(llmctl_: Program, damaged: Path) -> None:
    rows = {row["name"]: row for row in json.loads(llmctl_("runs", "list", "--json").out)}
    assert list(rows) == sorted(["aa", *DAMAGE, "zz"])
    assert rows["aa"]["status"] == rows["zz"]["status"] == "done"
    for name, (_, reason) in DAMAGE.items():
        assert rows[name]["status"] == "damaged"
        assert rows[name]["result"].startswith(reason)
    assert llmctl_("runs", "list").code == 0


@pytest.mark.parametrize("words", ["show {}", "verify {}", "watch {}", "rename {} new/name"])
def test_commands_on_a_damaged_run(words: str, llmctl_: Program, damaged: Path) -> None:
    for name in DAMAGE:
        ended = llmctl_("runs", *words.format(name).split())
        if words.startswith("rename"):  # a damaged run may be moved all the same
            assert ended.code == 0
            assert llmctl_("runs", "rename", "new/name", f"runs/{name}").code == 0
        else:
            assert ended.code == (3 if "verify" in words else 1)
            assert f"error: runs/{name}/{DAMAGE[name][1]}" in ended.err and "internal" not in ended.err


def test_lineage_and_resume_beside_damaged_runs(llmctl_: Program, damaged: Path) -> None:
    child = make_run(Path("runs/child"), "sft", ("model", Path("runs/aa")))
    manifest = json.loads((child / "run.json").read_text())
    manifest["parents"][0]["path"] = "runs/gone"  # so that all of them are searched
    (child / "run.json").write_text(json.dumps(manifest))
    assert "runs/aa (pretrain) moved from runs/gone" in llmctl_("runs", "lineage", "child").out
    assert "DAMAGED: runs/pipe/run.json: not a regular file" in llmctl_("runs", "lineage", "pipe").out
    ended = llmctl_("pretrain", "--resume", "--out", "runs/pipe", "--data", "builtin:tinyworld")
    assert ended.code == 1 and "runs/pipe/run.json: not a regular file" in ended.err


def test_one_pass_finds_the_same_runs(llmctl_: Program, damaged: Path) -> None:
    make_run(Path("runs/deep/er"), "sft")
    make_run(Path("runs/deep/er/checkpoints/step-000001"), "sft")
    make_run(Path("runs/.hidden"), "sft")
    Path("runs/deep/link").symlink_to("..")
    found = sizes_of_runs(damaged)
    assert [path for path, _ in found] == sorted(find_runs(damaged))
    assert dict(found)[Path("runs/deep/er")] == sum(
        file.stat().st_size for file in Path("runs/deep/er").rglob("*") if file.is_file()
    )


def test_a_run_of_the_first_format_opens(llmctl_: Program) -> None:
    """run.json as written before manifests held the recipe."""
    path = Path("runs/old")
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("stage: pretrain\ntrain:\n  seed: 1\n")
    old = {
        "format": 1, "stage": "pretrain", "created": "2026-01-01T00:00:00+0000", "status": "interrupted",
        "versions": {"llmctl": "0.1.0"}, "command": "pretrain --out runs/old", "seed": 1, "device": "cpu, float32",
        "parents": [], "data": {"train": {"sources": ["a.txt"], "fingerprint": "f"}}, "tokenizer": "t",
        "template": None, "updated": "2026-01-01T00:01:00+0000", "error": None,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(old))
    assert llmctl_("runs", "list").out.splitlines()[1].split()[:3] == ["old", "pretrain", "interrupted"]
    for command in ("show", "lineage", "verify", "watch"):
        assert llmctl_("runs", command, "old").code == 0
    with Run.start("pretrain", path, "stage: pretrain\ntrain:\n  seed: 1\n  new: auto\n", resume=True) as run:
        run.finish({})
    now = json.loads((path / "run.json").read_text())
    assert now["format"] == 2 and now["recipe"]["fields"] == {
        "stage": "pretrain", "train.seed": 1, "train.new": "auto",
    }  # fmt: skip


def test_a_result_that_is_a_pipe_does_not_hang(llmctl_: Program) -> None:
    run = make_run(Path("runs/one"), "sft")
    file = run / next(iter(json.loads((run / "run.json").read_text())["outputs"]))
    file.unlink()
    os.mkfifo(file)
    said = llmctl_("runs", "verify", "one")
    assert said.code == 3
    assert f"{file}: not a regular file" in said.out
    assert f"{file}: not a regular file" in llmctl_("runs", "show", "one").out


@pytest.mark.parametrize("name", ["/dev/zero", "../other/model.safetensors", "..", ""])
def test_a_result_is_named_within_its_run(llmctl_: Program, name: str) -> None:
    run = make_run(Path("runs/one"), "sft")
    entry("outputs", {name: "0"})(run / "run.json")
    assert "outputs is not an object of file names and hashes" in llmctl_("runs", "show", "one").err
