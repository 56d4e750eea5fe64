"""Writing files so that a crash, a full disk or a second process cannot leave half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.reading import Unreadable, open_regular, parse_json, read_bytes

CHUNK = 1 << 20
LARGEST_JSON = 1 << 30  # bytes of one of a model's own files, such as tokenizer.json
OLD = "old"  # marks a temporary folder that holds what is being replaced
# what the errors of tokenizers, safetensors and torch say when there is no room left
FULL_DISK = ("No space left", "os error 28", "PytorchStreamWriter failed", "unexpected pos")


@contextlib.contextmanager
def disk_errors(path: Path, elsewhere: str = "choose another folder with --out") -> Iterator[None]:
    """Turn the operating system's refusals around `path` into a `UserError` with a hint.

    `elsewhere` is the hint that says how to write to another place.

    Libraries wrap "disk full" in errors of their own (safetensors raises `SafetensorError`, torch
    `RuntimeError`, of which the last one speaks of a position), so the text is looked at as well.
    """
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename or path}: no permission to write", elsewhere) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from error
        if error.errno == errno.EROFS:
            raise UserError(f"{path}: the file system is read-only", elsewhere) from error
        raise
    except Exception as error:
        if any(words in str(error) for words in FULL_DISK):
            raise _full(path) from error
        raise


def _full(path: Path) -> UserError:
    return UserError(
        f"{path}: the disk is full",
        "free some space and run the same command again; a run that had begun goes on with --resume",
    )


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str, elsewhere: str = "choose another folder with --out") -> None:
    """Write a whole file under a temporary name, fsync, rename. Readers see the old file or the new.

    `elsewhere` is as in `disk_errors`.
    """
    # what a path that is not UTF-8 holds (lone surrogates) is written as JSON would escape it
    raw = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with disk_errors(path, elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def umask() -> int:
    """The bits of a mode that new files of this process do not get."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o077)  # there is no other way to ask; other threads see it for a moment
        os.umask(mask)
        return mask


def _share(folder: Path) -> None:
    """Give a folder and all in it the modes they would have if they had been made plainly.

    `mkdtemp` and the writer of safetensors keep what they make to the user alone.
    """
    mask = umask()
    os.chmod(folder, 0o777 & ~mask)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed `write_atomic` left in a folder; the caller sees to it that no one writes there now."""
    with disk_errors(folder):
        for left in folder.glob(".tmp-*"):
            if left.is_file():
                left.unlink()


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


@contextlib.contextmanager
def folder_atomic(path: Path, elsewhere: str = "choose another folder with --out") -> Iterator[Path]:
    """Build a whole folder under a temporary name beside `path`, fsync every file, rename.

    Yields the temporary folder. If the body raises, the folder vanishes and `path` is as it was; an
    existing `path` is replaced only after the new one is complete. What a killed process leaves is
    named `.tmp-…` and removed by the next writer of the same path. `elsewhere` is as in `disk_errors`.
    """
    parent = path.parent
    with disk_errors(path, elsewhere), temporary_beside(path) as temporary:
        try:
            yield temporary
            _share(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(temporary)
            if path.exists():
                _replace_folder(path, temporary)
            else:
                os.replace(temporary, path)
            sync_folder(parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_folder(path: Path, new: Path) -> None:
    """Put `new` in the place of the folder `path`; if that is interrupted, the old one is put back, now or later."""
    with _flocked(path.parent):
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name}-{OLD}-"))
        try:
            os.replace(path, old / path.name)
            os.replace(new, path)
        except BaseException:
            if not path.exists() and (old / path.name).exists():
                os.replace(old / path.name, path)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """An empty folder `.tmp-NAME-…` beside `path`, which the caller moves or deletes.

    First it removes those of processes that are gone. A living process holds a flock on its own, which the kernel drops when
    it dies; where the file system has no flock, there may be one writer of a path at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _flocked(path.parent):  # a folder that was just made is not locked yet
        for left in path.parent.glob(f".tmp-{glob.escape(path.name)}-*"):
            _remove_if_left(left, path)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name}-"))
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        os.close(handle)


def _remove_if_left(left: Path, path: Path) -> None:
    try:
        with _flocked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if left.name.startswith(f".tmp-{path.name}-{OLD}-") and not path.exists():
                with contextlib.suppress(OSError):
                    os.replace(left / path.name, path)  # killed while it replaced a folder
            shutil.rmtree(left, ignore_errors=True)
    except BlockingIOError:
        return  # its process lives


@contextlib.contextmanager
def _flocked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a flock on a folder, if its file system has them. Raises BlockingIOError as asked for by LOCK_NB."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
                raise
        yield
    finally:
        os.close(handle)


def file_hash(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, hexadecimal. `on_bytes` is told how many each block held.

    Raises Unreadable for what is not a regular file: a pipe would never end, nor would /dev/zero.
    """
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def known_hash(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """As `file_hash`; a file whose size and time are as they were is read once in a process.

    Threads that ask for the same file wait for the one that reads it.
    """
    about = path.stat()
    key = (path.resolve(), about.st_size, about.st_mtime_ns)
    with _asking:
        reading = _reading.setdefault(key, threading.Lock())
    with reading:
        if key not in _hashes:
            _hashes[key] = file_hash(path, on_bytes)
        elif on_bytes is not None:
            on_bytes(about.st_size)
        return _hashes[key]


_asking = threading.Lock()
_reading: dict[tuple[Path, int, int], threading.Lock] = {}
_hashes: dict[tuple[Path, int, int], str] = {}


def combined_hash(hashes: dict[str, str]) -> str:
    """One hash over a set of named hashes, independent of their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing, not a regular file, not JSON or not an object."""
    again = "copy or download the model again"
    try:
        text = read_bytes(path, LARGEST_JSON).decode("utf-8-sig")  # some editors put a mark before it
        value = parse_json(text, wide=True)
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: not a model folder (no {path.name})", "see `llmctl runs list`"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})", again) from None
    except Unreadable as error:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a file", again) from None
        hint = "ask its owner, or copy the folder" if "permission" in str(error) else again
        raise UserError(f"{path}: {error}", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object", again)
    return value
