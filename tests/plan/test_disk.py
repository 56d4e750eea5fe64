"""The disk a run needs, and its refusal where there is too little of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl.errors import UserError
from llmctl.plan.disk import free_bytes, refuse_small_disk, training_disk


@pytest.mark.parametrize(
    ("steps", "save_steps", "keep", "count"),
    [(100, 10, 2, 3), (100, 100, 2, 1), (100, 60, 2, 2), (5, 1, 9, 5)],
)
def test_checkpoints_that_lie_there_at_once(steps: int, save_steps: int, keep: int, count: int) -> None:
    disk = training_disk(1000, 50, steps=steps, save_steps=save_steps, keep=keep)
    assert disk["checkpoints"] == count * (12 * 1000 + 50)
    assert disk["result"] > 4 * 1000 + 50
    assert "best" in training_disk(1000, 50, steps=1, save_steps=1, keep=1, best=True)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 3 MiB left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))


def test_a_small_disk_is_refused(tmp_path: Path, full: None) -> None:
    out = tmp_path / "runs" / "x"
    assert free_bytes(out) == 3 << 20
    refuse_small_disk(out, {"result": 3 << 20})
    with pytest.raises(UserError) as caught:
        refuse_small_disk(out, {"checkpoints": 4 << 20, "result": 1 << 20})
    assert caught.value.message == (
        f"{out}: the run will write up to 5.0 MiB (checkpoints 4.0 MiB, result 1.0 MiB), but the disk has 3.0 MiB free"
    )
    assert caught.value.hint == (
        "free some space, or choose a folder on another disk with --out; "
        "fewer checkpoints take less: train.save_total_limit=1"
    )
    with pytest.raises(UserError) as caught:
        refuse_small_disk(out, {"result": 4 << 20})
    assert caught.value.hint == "free some space, or choose a folder on another disk with --out"


def test_what_a_run_has_written_already_counts(tmp_path: Path, full: None) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model").write_bytes(b"0" * (2 << 20))
    refuse_small_disk(tmp_path, {"checkpoints": 5 << 20})
