"""Nothing half-written: the old file or the new one, the old folder or the new one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from llmctl import files
from llmctl.errors import UserError


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.write_atomic(path, "old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert left_over(path.parent) == ["b.txt"]
    files.write_json(path, {"ä": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, None]}
    assert "ä" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_modes(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        assert files.umask() == mask
        files.write_atomic(tmp_path / "a", "1")
        with files.folder_atomic(tmp_path / "f") as folder:
            (folder / "sub").mkdir(mode=0o700)
            (folder / "sub" / "weights").touch(mode=0o600)  # as the writer of safetensors makes it
            os.chmod(folder / "sub", 0o700)
    finally:
        os.umask(before)
    for name, plain in (("a", 0o666), ("f", 0o777), ("f/sub", 0o777), ("f/sub/weights", 0o666)):
        assert (tmp_path / name).stat().st_mode & 0o777 == plain & ~mask


def test_a_path_that_is_not_utf8_is_written_and_read_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"command": "pretrain \udcff"})
    assert files.read_json(tmp_path / "a.json") == {"command": "pretrain \udcff"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_when_it_fails(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError) as caught:
        files.write_atomic(path, "new")
    assert caught.value.message == f"{path}: the disk is full"
    assert path.read_text() == "old"
    assert left_over(tmp_path) == ["b.txt"]


DISK = [
    (PermissionError(errno.EACCES, "no", "/x/y"), "/x/y: no permission to write", "go elsewhere"),
    (OSError(errno.EROFS, "read-only"), "out: the file system is read-only", "go elsewhere"),
    (
        OSError(errno.EDQUOT, "quota"),
        "out: the disk is full",
        "free some space and run the same command again; a run that had begun goes on with --resume",
    ),
    # libraries have errors of their own for the same thing
    (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        "out: the disk is full",
        "free some space and run the same command again; a run that had begun goes on with --resume",
    ),
]


@pytest.mark.parametrize(("error", "message", "hint"), DISK, ids=lambda x: str(x)[:20])
def test_disk_errors(error: Exception, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught, files.disk_errors(Path("out"), "go elsewhere"):
        raise error
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), RuntimeError("a bug"), UserError("told")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, files.disk_errors(Path("out")):
        raise error
    assert caught.value is error


def test_folder_atomic_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "step-1"
    with files.folder_atomic(path) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("2")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename works only within one file system"
    assert (path / "sub" / "b").read_text() == "2"
    assert path.stat().st_mode & 0o777 == 0o755
    assert left_over(path.parent) == ["step-1"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_folder_atomic_leaves_everything_as_it_was_when_the_body_raises(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "step-1"
    for before in (False, True):
        if before:
            path.mkdir()
            (path / "a").write_text("old")
        told = UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(told), files.folder_atomic(path) as temporary:
            (temporary / "a").write_text("new")
            raise error
        assert left_over(tmp_path) == (["step-1"] if before else [])
    assert (path / "a").read_text() == "old"


def test_folder_atomic_replaces_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "old").touch()
    with files.folder_atomic(path) as temporary:
        (temporary / "new").touch()
    assert left_over(path) == ["new"]
    assert left_over(tmp_path) == ["step-1"]


def test_folder_atomic_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-1-dead").mkdir()
    (tmp_path / ".tmp-step-2-other").mkdir()
    with files.folder_atomic(tmp_path / "step-1"):
        pass
    assert left_over(tmp_path) == [".tmp-step-2-other", "step-1"]


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * (files.CHUNK + 1))
    seen: list[int] = []
    assert files.file_hash(path, seen.append) == files.file_hash(path)
    assert seen == [files.CHUNK, 1]
    (tmp_path / "empty").touch()
    # the published SHA-256 of nothing
    assert files.file_hash(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")
    assert files.combined_hash({"a": "1", "b": "2"}) == files.combined_hash({"b": "2", "a": "1"})
    assert files.combined_hash({"a": "1", "b": "2"}) != files.combined_hash({"a": "2", "b": "1"})


def test_folder_atomic_keeps_what_a_living_writer_makes(tmp_path: Path) -> None:
    """The folder of a writer that lives is locked; a name that only begins alike is another path's."""
    path = tmp_path / "a[1]"
    with files.folder_atomic(path) as first:
        (first / "x").touch()
        with files.folder_atomic(path) as second:
            (second / "y").touch()
        assert first.is_dir() and left_over(path) == ["y"]
    assert left_over(path) == ["x"]
    assert left_over(tmp_path) == ["a[1]"]


@pytest.mark.parametrize("dies", [False, True])
def test_a_folder_is_not_lost_while_it_is_replaced(
    dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the two renames it is put back at once; killed, by the next writer."""
    path, usual = tmp_path / "step-1", os.replace
    path.mkdir()
    (path / "old").touch()

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == path and dies:
            os._exit(9)
        if Path(target) == path and Path(source).parent == tmp_path:
            raise KeyboardInterrupt
        usual(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    if dies:
        child = os.fork()
        if child == 0:
            with files.folder_atomic(path) as temporary:
                (temporary / "new").touch()
        os.waitpid(child, 0)
        assert not path.exists()
        monkeypatch.setattr(os, "replace", usual)
        with pytest.raises(ValueError, match="no"), files.folder_atomic(path):
            raise ValueError("no")
    else:
        with pytest.raises(KeyboardInterrupt), files.folder_atomic(path) as temporary:
            (temporary / "new").touch()
    assert left_over(path) == ["old"] and left_over(tmp_path) == ["step-1"]
