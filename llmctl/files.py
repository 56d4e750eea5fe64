"""Writing files so that a crash, a full disk or a second process cannot leave half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmctl.errors import UserError

CHUNK = 1 << 20
SMALL = 32 * CHUNK  # bytes of a config, an index, a manifest: larger ones are something else
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
        if not _refused(error, path):
            raise
        said = (error.strerror or str(error)).lower()
        raise UserError(f"{error.filename or path}: cannot be written ({said})", elsewhere) from error
    except Exception as error:
        if any(words in str(error) for words in FULL_DISK):
            raise _full(path) from error
        raise


def _refused(error: OSError, path: Path) -> bool:
    """Whether the error says that `path` cannot be written, as in /proc, where no folder can be made.

    One about another file is none of ours, nor is a file that is missing from a folder that is there.
    """
    if error.errno == errno.EIO:
        return True
    if not isinstance(error.filename, str | bytes):
        return False
    named, whole = Path(os.fsdecode(error.filename)).absolute(), path.absolute()
    temporary = named.parent == whole.parent and whole.name in named.name
    near = temporary or named.is_relative_to(whole) or whole.is_relative_to(named)
    return near and not (error.errno == errno.ENOENT and os.path.lexists(path))


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
    # half a surrogate pair (of a file's name that is not UTF-8) becomes `\udcff`, which JSON reads as what it was
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with disk_errors(path, elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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
    named `.tmp-…` and removed by the next writer of the same path. So there may be one writer of a
    path at a time; the caller sees to that. `elsewhere` is as in `disk_errors`.
    """
    parent = path.parent
    with disk_errors(path, elsewhere):
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f".tmp-{path.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".tmp-{path.name}-"))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(temporary)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=parent, prefix=f".tmp-{path.name}-old-"))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            sync_folder(parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def file_hash(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, hexadecimal. `on_bytes` is told how many each block held."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def combined_hash(hashes: dict[str, str]) -> str:
    """One hash over a set of named hashes, independent of their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_bounded(path: Path, most: int = SMALL) -> bytes:
    """The bytes of a file that should be small.

    Raises UserError for one that is larger than `most` bytes, and for a pipe or a device, which may have no end; what
    the shell hands over as `<(…)` may be a pipe. Otherwise raises OSError as `open` does.
    """
    handed_over = str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or handed_over):
        raise UserError(f"{path}: not a regular file, but a pipe or a device", "name a file")
    with open(path, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise UserError(
            f"{path}: larger than {most / CHUNK:,.0f} MiB, so it is no such file", "check what was named"
        )
    return raw


def json_fault(error: ValueError | RecursionError) -> str:
    """What `json.loads` has against a text, for a message."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"not valid JSON ({error})"
    return "not valid JSON (an integer of thousands of digits)"  # the only other thing it refuses


def read_json(path: Path, most: int = SMALL) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing, not JSON, not an object or larger than `most` bytes."""
    again = "copy or download the model again"
    try:
        raw = read_bounded(path, most)
        value = json.loads(raw.decode("utf-8-sig"))  # some editors put a mark before it
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: not a model folder (no {path.name})", "see `llmctl runs list`"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a file", again) from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read", "ask its owner, or copy the folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {json_fault(error)}", again) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})", again) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object", again)
    return value
