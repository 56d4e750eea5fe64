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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOENT, "No such file", "out"), "out: cannot be written (no such file)"),
        (OSError(errno.ELOOP, "Too many links", "out/a/b"), "out/a/b: cannot be written (too many links)"),
        (
            OSError(errno.ENOTDIR, "Not a directory", ".out.tmp"),
            ".out.tmp: cannot be written (not a directory)",
        ),
        (OSError(errno.EIO, "Input/output error"), "out: cannot be written (input/output error)"),
    ],
)
def test_a_place_that_cannot_be_written(error: OSError, message: str) -> None:
    with pytest.raises(UserError) as caught, files.disk_errors(Path("out"), "go elsewhere"):
        raise error
    assert (caught.value.message, caught.value.hint) == (message, "go elsewhere")


OTHERS = [
    OSError(errno.ENOENT, "gone"),
    OSError(errno.ENOENT, "gone", "elsewhere/file"),
    RuntimeError("a bug"),
    UserError("told"),
]


@pytest.mark.parametrize("error", OTHERS)
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


def test_a_name_that_is_not_utf_8_reads_back(tmp_path):
    files.write_json(tmp_path / "a.json", {"path": "a\udcff", "text": "ü"})
    assert files.read_json(tmp_path / "a.json") == {"path": "a\udcff", "text": "ü"}
    assert "ü".encode() in (tmp_path / "a.json").read_bytes()


def test_a_pipe_a_device_and_a_large_file_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 3_000_000)
    for path, said in (
        (tmp_path / "pipe", "not a regular file, but a pipe or a device"),
        (Path("/dev/zero"), "not a regular file, but a pipe or a device"),
        (tmp_path / "large", "larger than 1 MiB, so it is no such file"),
    ):
        with pytest.raises(UserError) as caught:
            files.read_bounded(path, 1 << 20)
        assert caught.value.message == f"{path}: {said}"


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError) as caught:
        files.write_atomic(Path("/proc/nothing/a"), "x")
    assert caught.value.message.startswith("/proc/nothing: cannot be written (")
    assert caught.value.hint == "choose another folder with --out"
