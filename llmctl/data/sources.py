"""From what the user names to files that exist, and from a file to its bytes."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from llmctl.data.builtin import BUILTIN, BUILTIN_RECORDS
from llmctl.data.document import Account
from llmctl.data.hub import dataset_files, is_hub_name
from llmctl.errors import UserError, nearest, one_of

BUILTIN_PREFIX = "builtin:"
FORMATS = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
# A data set on the hub has texts about itself in .md and code in .py.
HUB_ENDINGS = tuple(
    f"{format}{packed}"
    for format in (".json", ".jsonl", ".csv", ".parquet", ".txt")
    for packed in ("", *COMPRESSIONS)
)
BUFFER = 1 << 18  # bytes

Wanted = Literal["text", "records"]


def resolve(sources: Iterable[str | Path], wanted: Wanted = "text") -> list[Path | str]:
    """The files and builtins that `sources` name, in the order named; folders and globs sorted.

    A source is a file, a folder (read recursively; hidden files and unknown extensions are not data),
    a glob, `builtin:NAME`, which stays a string, or the id of a dataset on the hub.

    Args:
        wanted: "text" refuses the builtins that hold records.

    Raises:
        UserError: nothing is named, a name leads to nothing, an extension or builtin is unknown, a
            file is empty, or two names lead to the same file.
    """
    found: list[Path | str] = []
    named_by: dict[str, str] = {}
    for source in map(str, sources):
        for item in _expand(source, wanted):
            same = item if isinstance(item, str) else os.path.realpath(item)
            if same in named_by:
                by = named_by[same]
                twice = "twice" if by == source else f"by {by} and by {source}"
                raise UserError(
                    f"{item}: named {twice}", "name each file once; num_train_epochs repeats all of them"
                )
            named_by[same] = source
            found.append(item)
    if not found:
        raise UserError("no data is named", "name files, folders, globs or builtin:NAME with --data")
    return found


def total_bytes(sources: Iterable[str | Path]) -> int | None:
    """Size of all files on the disk; None if a builtin is among them, which makes its text as it goes."""
    items = resolve(sources, "records")
    files = [item for item in items if isinstance(item, Path)]
    return sum(file.stat().st_size for file in files) if len(files) == len(items) else None


def file_format(path: Path) -> str | None:
    """The extension that says how to read a file, without `.gz` or `.zst`; None if it is unknown."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in FORMATS else None


def _expand(source: str, wanted: Wanted) -> list[Path | str]:
    if source.startswith(BUILTIN_PREFIX):
        return [_builtin(source, wanted)]
    path = Path(source).expanduser()
    with reading(path):
        if path.is_dir():
            return list(_in_folder(path))
        if path.exists():
            return [_file(path)]
        if is_hub_name(source) and file_format(path) is None:
            return list(dataset_files(source, HUB_ENDINGS))
        if glob.has_magic(source):
            return list(_matches(path))
    raise _missing(path)


def _builtin(source: str, wanted: Wanted) -> str:
    name = source.removeprefix(BUILTIN_PREFIX)
    known = [*BUILTIN, *BUILTIN_RECORDS] if wanted == "records" else list(BUILTIN)
    if name in known:
        return source
    if name in BUILTIN_RECORDS:
        raise UserError(
            f"{source}: holds records, not text",
            f"text is in {one_of([BUILTIN_PREFIX + n for n in BUILTIN])}",
        )
    close = nearest(name, known)
    raise UserError(
        f"{source}: no such builtin data; there is {one_of([BUILTIN_PREFIX + n for n in known])}",
        f"did you mean `{BUILTIN_PREFIX}{close}`?" if close else "pick one of these, or name a file",
    )


def _file(path: Path) -> Path:
    if file_format(path) is None:
        raise UserError(
            f"{path}: cannot tell how to read `{path.suffix or path.name}` files",
            f"known are {one_of(list(FORMATS))}, each also with .gz or .zst; rename or convert it",
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty", "check how it was made, or leave it out")
    return path


def _in_folder(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    with reading(folder):
        for above, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(above) / name for name in names if not name.startswith(".")]
    found = sorted(file for file in found if file_format(file) is not None and file.is_file())
    if not found:
        raise UserError(f"{folder}: the folder holds no data files", f"known are {one_of(list(FORMATS))}")
    return found


def _matches(pattern: Path) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if os.path.isfile(name)]
    if not files:
        raise UserError(f"{pattern}: no file matches", "check the pattern; ** crosses folders")
    known = [file for file in files if file_format(file) is not None]
    return known or [_file(files[0])]


def _missing(path: Path) -> UserError:
    hint = "check the path; it is taken from the folder you are in"
    if path.parent.is_dir():
        with reading(path.parent):
            close = nearest(path.name, [name.name for name in path.parent.iterdir()])
        hint = f"did you mean `{path.parent / close}`?" if close else hint
    return UserError(f"{path}: no such file or folder", hint)


class _CountedFile(io.FileIO):
    """A file that tells the account how many bytes were taken from it."""

    def __init__(self, path: Path, account: Account) -> None:
        super().__init__(path, "r")
        self._account = account

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        count = super().readinto(buffer)
        self._account.input_bytes += count or 0
        return count


@contextlib.contextmanager
def open_bytes(path: Path, account: Account) -> Iterator[BinaryIO]:
    """A file's bytes as a buffered stream, decompressed by its extension; `account` counts them.

    Raises UserError if the file cannot be opened, or as it is read: damaged, truncated, no permission.
    """
    suffix = path.suffix.lower()
    with reading(path), contextlib.ExitStack() as stack:
        raw = stack.enter_context(io.BufferedReader(_CountedFile(path, account), BUFFER))
        if suffix == ".gz":
            yield stack.enter_context(gzip.open(raw))
        elif suffix == ".zst":
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
            yield stack.enter_context(io.BufferedReader(stream, BUFFER))
        else:
            yield raw


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system and the decompressors say about `path` into a `UserError`."""
    suffix = path.suffix.lower()
    try:
        yield
    except PermissionError as error:
        place = error.filename or path
        raise UserError(f"{place}: no permission to read", "ask its owner, or copy it elsewhere") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", "it may have been moved while it was read") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, not a file", "name a file inside it") from error
    except EOFError as error:
        raise UserError(
            f"{path}: the compressed file is truncated", "copy or download it again; nothing was used of it"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a gzip file, or a damaged one", "copy or download it again; `gzip -t` tests it"
        ) from error
    except OSError as error:
        # Arrow reports a broken zstd stream as an OSError without an error number.
        if suffix == ".zst" and error.errno is None:
            raise UserError(
                f"{path}: not a zstd file, or a damaged or truncated one",
                "copy or download it again; `zstd -t` tests it",
            ) from error
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error})", "check the disk it lies on"
        ) from error
