"""`llmctl doctor`: what it compares, and what it tells to do."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llmctl.cli import doctor
from llmctl.kernels import threads
from tests.program import Program

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_dependency_has_one_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]]
    # a CUDA build of torch requires one version of it, which another would keep from being installed
    needed = [need for need in needed if need.name != "triton"]
    tested = doctor.tested_versions()
    assert tested.keys() == {need.name.lower() for need in needed}
    for need in needed:
        assert need.specifier.contains(tested[need.name.lower()], prereleases=True), need


@pytest.mark.parametrize(
    ("installed", "needed", "tested", "state", "found", "mend"),
    [
        ("2.13.0", ">=2.11", "2.13.0", "ok", "2.13.0", None),
        ("2.13.0+cpu", ">=2.11", "2.13.0", "ok", "2.13.0+cpu", None),
        ("2.14.1", ">=2.11", "2.13.0", "note", "2.14.1; tested with 2.13.0", None),
        (
            "2.9.0",
            ">=2.11",
            "2.13.0",
            "missing",
            "2.9.0, but llmctl needs >=2.11",
            "pip install 'lib==2.13.0'",
        ),
        (None, ">=2.11", "2.13.0", "missing", "not installed", "pip install 'lib==2.13.0'"),
        (None, ">=2.11", None, "missing", "not installed", "pip install 'lib>=2.11'"),
    ],
)
def test_libraries(
    installed: str | None,
    needed: str,
    tested: str | None,
    state: str,
    found: str,
    mend: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    assert doctor.library("lib", SpecifierSet(needed), tested) == doctor.Finding("lib", state, found, mend)


def test_report_of_this_machine(llmctl_: Program) -> None:
    report = json.loads(llmctl_("doctor", "--json").out)
    names = [finding["name"] for finding in report["findings"]]
    for name in ("python", "torch", "transformers", "cpu", "threads", "memory", "runs", "cache"):
        assert name in names
    found = {finding["name"]: finding["found"] for finding in report["findings"]}
    assert re.fullmatch(r"computes in (bfloat16|float32)", found["cpu"])
    assert re.fullmatch(r"\d+ \(\d+ cores?(, .+)?\)", found["threads"])


def test_threads_with_their_reason(llmctl_: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threads.Choice(2, 4, "8 cores, the cgroup's quota is 4, other programs keep 6 busy", 6)
    monkeypatch.setattr(threads, "look", lambda: busy)
    shown = llmctl_("doctor").out
    assert re.search(
        r"^threads +ok +2 \(8 cores, the cgroup's quota is 4, other programs keep 6 busy\)$", shown, re.M
    )


def test_something_missing_exits_1_and_says_how_to_mend_it(
    llmctl_: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = doctor.Finding("peft", "missing", "not installed", "pip install 'peft==0.21.2'")
    monkeypatch.setattr(doctor, "libraries", lambda: [gone])
    monkeypatch.setattr(doctor, "torch_devices", lambda: [])
    ended = llmctl_("doctor")
    assert ended.code == 1
    assert "peft    MISSING  not installed\n" in ended.out
    assert ended.out.endswith("\nto mend:\n  peft: pip install 'peft==0.21.2'\n\n1 needed thing is missing\n")


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = doctor.folder("runs", tmp_path / "not" / "yet")
    assert good.state in ("ok", "note")
    assert not (tmp_path / "not").exists(), "looking changes nothing"
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 80)
    full = doctor.folder("runs", tmp_path)
    assert full.state == "note"
    assert full.mend is not None and full.mend.startswith("make room")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    closed = doctor.folder("runs", tmp_path)
    assert closed.found.endswith("no permission to write")
