"""Files to records, streaming: objects of a JSON array, lines of jsonl, rows of csv and parquet.

A record is a dict and the place it came from. What a file should hold and does not stops the reading,
with the line. What the keys mean is no matter here: see `formats` for examples, `readers` for text.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.data.array import Array
from llmctl.data.builtin import BUILTIN, BUILTIN_RECORDS
from llmctl.data.decode import BLOCK, decoded, lines
from llmctl.data.document import Account, Limit
from llmctl.data.sources import BUILTIN_PREFIX, file_format, open_bytes, reading, resolve
from llmctl.data.strict_json import DECODER, MOST_NAMES, refuse_many_values, shown, why_not
from llmctl.errors import UserError, one_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PARQUET_ROWS = 256  # rows decoded at a time
BATCH_BYTES = 1 << 24  # of rows of a parquet file decoded at a time
DEFAULT_LIMIT = Limit()
LONG_MAX = (1 << 31) - 1  # what a C long holds everywhere


@dataclass(frozen=True, slots=True)
class Record:
    """One object, and where it came from.

    Args:
        source: the file or `builtin:NAME`, as `resolve` lists it.
        line: the line on which it begins, the row of a parquet file, the ordinal in a builtin; from 1.
        column: where it begins on its line, from 1, if another one begins before it there; else 0.
    """

    value: dict[str, Any]
    source: str
    line: int
    column: int = 0

    @property
    def place(self) -> str:
        """How the messages name it: "data.json:3", and "data.json:1:40" if it shares its line."""
        return place(self.source, self.line, self.column)


def place(source: str, line: int, column: int = 0) -> str:
    """A line of a file, as editors understand it."""
    return f"{source}:{line}:{column}" if column else f"{source}:{line}"


def records(
    sources: Iterable[str | Path], account: Account, limit: Limit = DEFAULT_LIMIT
) -> Iterator[Record]:
    """Every record of the sources, in order. A text file or a text of a builtin is {"text": …}.

    `account` counts the bytes, and what a builtin leaves out; whether a record is kept, the caller
    tells it.

    Raises:
        UserError: as `resolve`; or, while reading, the first thing that is wrong with a file.
    """
    for item in resolve(sources, "records"):
        yield from records_in(item, account, limit)


def records_in(item: Path | str, account: Account, limit: Limit = DEFAULT_LIMIT) -> Iterator[Record]:
    """The records of one thing that `resolve` found."""
    if isinstance(item, str):
        return _of_builtin(item, account)
    return READERS[file_format(item) or ""](item, account, limit)


def holds_text(item: Path | str) -> bool:
    """Whether the records of a file or builtin are plain texts, {"text": …}."""
    if isinstance(item, str):
        return item.removeprefix(BUILTIN_PREFIX) in BUILTIN
    return READERS[file_format(item) or ""] is _text


def kind(value: Any) -> str:
    """What the messages call a value: "a list", "a number"."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def listed(names: Iterable[str], most: int = MOST_NAMES) -> str:
    """Some of the keys of a record: `a`, `b`, …"""
    found = list(names)
    return one_of([shown(name) for name in found[:most]]) + (", …" if len(found) > most else "")


def _of_builtin(item: str, account: Account) -> Iterator[Record]:
    name = item.removeprefix(BUILTIN_PREFIX)
    if name in BUILTIN_RECORDS:
        for number, value in enumerate(BUILTIN_RECORDS[name].records(), start=1):
            yield Record(value, item, number)
    else:
        for document in BUILTIN[name].documents(account):
            yield Record({"text": document.text}, item, document.line or 1)


def _text(path: Path, account: Account, limit: Limit) -> Iterator[Record]:
    parts, size = [], 0
    with open_bytes(path, account) as stream:
        for part in decoded(path, stream):
            parts.append(part)
            size += len(part)
            if size > limit.bytes:
                raise limit.exceeded(str(path), "the text, which is one record here,")
    yield Record({"text": "".join(parts)}, str(path), 1)


# --- JSON -------------------------------------------------------------------------------------------


def _json(path: Path, account: Account, limit: Limit) -> Iterator[Record]:
    source = str(path)
    with open_bytes(path, account) as stream:
        for line, column, value in Array(path, decoded(path, stream), DECODER, limit):
            yield Record(value, source, line, column)


def _jsonl(path: Path, account: Account, limit: Limit) -> Iterator[Record]:
    """One object a line. Lines without anything on them are not records."""
    source = str(path)
    with open_bytes(path, account) as stream:
        for number, line in enumerate(lines(path, stream, limit), start=1):
            if not line or line.isspace():
                continue
            try:
                value = _decoded(line, f"{path}:{number}")
            except (ValueError, RecursionError) as error:
                raise _bad_line(path, number, line, error) from None
            del line  # a long one is not held beside what is in it
            if type(value) is not dict:
                raise UserError(
                    f"{path}:{number}: the line holds {kind(value)}, not an object",
                    'a jsonl file holds one object a line, as {"text": "…"}',
                )
            yield Record(value, source, number)


def _decoded(line: str, place: str) -> Any:
    refuse_many_values(place, line)
    try:
        return DECODER.decode(line)  # which takes white space at the end
    except ValueError:
        # a string without an end would be told as one with a line break in it
        return DECODER.decode(line.rstrip("\r\n"))


def _bad_line(path: Path, number: int, line: str, error: ValueError | RecursionError) -> UserError:
    place = f"{path}:{number}"
    if not line.strip("\0\r\n"):
        return UserError(
            f"{place}: the line holds zero bytes only: it was never written, or the disk was full",
            "delete the line, or copy or download the file again",
        )
    if "\r" in line.rstrip("\r\n"):
        return UserError(f"{place}: {OLD_MAC}", OLD_MAC_HINT)
    array = number == 1 and line.lstrip().startswith("[")
    return UserError(
        f"{place}: invalid JSON ({why_not(error)})",
        "a jsonl file holds one JSON object a line; "
        + ("rename it to .json if it is one list" if array else "mend or delete this line"),
    )


OLD_MAC = "lines end with a carriage return alone, not with a line feed"
OLD_MAC_HINT = r"convert it, as in `tr '\r' '\n' < OLD > NEW`"


# --- csv --------------------------------------------------------------------------------------------


def _csv(path: Path, account: Account, limit: Limit) -> Iterator[Record]:
    """One record a row, its keys from the first row. All values are strings."""
    csv.field_size_limit(min(limit.bytes, LONG_MAX))  # the csv module's own limit is 1 << 17
    source, begins = str(path), 1
    with open_bytes(path, account) as stream:
        row_lines = _RowLines(path, lines(path, stream, limit), limit)
        rows = csv.reader(row_lines, strict=True)
        try:
            header = next((row for row in rows if row), [])
            _check_header(path, header)
            begins = row_lines.begin(rows.line_num + 1)
            for row in rows:
                if len(row) == len(header):
                    yield Record(dict(zip(header, row, strict=True)), source, begins)
                elif row:
                    raise UserError(
                        f"{path}:{begins}: {len(row)} cells, but the header has {len(header)}",
                        'a cell with a comma, a quote or a line break in it stands in "quotes"',
                    )
                begins = row_lines.begin(rows.line_num + 1)
        except csv.Error as error:
            if "field larger" in str(error):
                raise limit.exceeded(f"{path}:{begins}", "a cell") from None
            if "new-line character" in str(error):
                raise UserError(f"{path}:{begins}: {OLD_MAC}", OLD_MAC_HINT) from None
            raise UserError(
                f"{path}:{begins}: not a csv record ({str(error).split(' - ')[0]})",
                'cells stand between commas; inside a cell in "quotes" a quote is doubled, as ""',
            ) from None


class _RowLines:
    """The lines of a csv file; those of one row may take no more than `limit` together."""

    def __init__(self, path: Path, found: Iterator[str], limit: Limit) -> None:
        self._path, self._lines, self._limit = path, found, limit
        self._begins, self._size = 1, 0

    def begin(self, line: int) -> int:
        """Say that a row begins on `line`, which is returned."""
        self._begins, self._size = line, 0
        return line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._size += len(line)
        if self._size > self._limit.bytes + 2:
            raise self._limit.exceeded(f"{self._path}:{self._begins}", "the row")
        return line


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise UserError(f"{path}: the file holds no header line", "the first line names the columns")
    if len(header) == 1:
        other = next(
            (name for mark, name in ((";", "semicolons"), ("\t", "tabs")) if mark in header[0]), None
        )
        if other:
            raise UserError(f"{path}:1: the cells stand between {other}", "write it again with commas")
    _check_names(f"{path}:1", header)


def _check_names(place: str, names: list[str]) -> None:
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise UserError(f"{place}: two columns are called `{shown(twice)}`", "rename or delete one of them")


# --- parquet ----------------------------------------------------------------------------------------


def _parquet(path: Path, account: Account, limit: Limit) -> Iterator[Record]:
    def all_columns(file: pq.ParquetFile) -> list[str]:
        names: list[str] = file.schema_arrow.names
        _check_names(str(path), names)
        return names

    return parquet_rows(path, account, all_columns, limit)


def parquet_rows(
    path: Path, account: Account, columns: Callable[[pq.ParquetFile], list[str]], limit: Limit
) -> Iterator[Record]:
    """One record a row, decoded a few hundred rows at a time, fewer where they are large.

    Args:
        columns: says which ones are read; what it raises is raised.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, source = 0, str(path)
    with reading(path), tempfile.TemporaryFile() as unpacked:
        size = path.stat().st_size
        compressed = path.suffix.lower() != ".parquet"
        if compressed:
            # parquet is read from its end, a compressed stream only from its beginning
            with open_bytes(path, Account()) as stream:
                first = stream.read(BLOCK)
                if not first.startswith(b"PAR1"):
                    raise UserError(
                        f"{path}: not a parquet file, or a damaged one (what is packed does not begin with PAR1)",
                        "copy or download it again",
                    )
                unpacked.write(first)
                shutil.copyfileobj(stream, unpacked)
        try:
            with pq.ParquetFile(unpacked if compressed else path, buffer_size=BLOCK) as file:
                wanted = columns(file)
                share = size / max(1, file.metadata.num_rows)
                before = account.input_bytes
                for batch in _row_batches(path, file, wanted, limit):
                    names = batch.schema.names
                    for cells in zip(*batch.columns, strict=True):
                        number += 1
                        values = (_without_nulls(cell.as_py()) for cell in cells)
                        yield Record(dict(zip(names, values, strict=True)), source, number)
                    account.input_bytes = before + int(number * share)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: row {number}: text that is not UTF-8 ({error.reason})",
                "write the file again with UTF-8 strings",
            ) from None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, (PermissionError, FileNotFoundError)):
                raise
            what = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"{path}: not a parquet file, or a damaged one ({what[:1].lower()}{what[1:]})",
                "copy or download it again",
            ) from error


def _row_batches(
    path: Path, file: pq.ParquetFile, columns: list[str], limit: Limit
) -> Iterator[pa.RecordBatch]:
    begins = 1
    # One row group after the other: a single iterator over all of them holds on to what it has read.
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        count = max(1, about.num_rows)
        parts = (about.column(number) for number in range(about.num_columns))
        size = sum(
            part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns
        )
        if size // count > limit.bytes:
            raise limit.exceeded(f"{path}: row {begins}", "a row of its row group", size // count)
        rows = min(PARQUET_ROWS, max(1, BATCH_BYTES * count // max(1, size)))
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
            if batch.nbytes > limit.bytes:
                _refuse_large(path, batch, begins, limit)
            yield batch
            begins += batch.num_rows


def _refuse_large(path: Path, batch: pa.RecordBatch, begins: int, limit: Limit) -> None:
    for number in range(batch.num_rows):
        if (size := batch.slice(number, 1).nbytes) > limit.bytes:
            raise limit.exceeded(f"{path}: row {begins + number}", "the row", size)


def _without_nulls(value: Any) -> Any:
    """A value with the empty fields of its structs taken out.

    All structs of a column have the same fields, so a null in one mostly means that it is not there.
    """
    if type(value) is dict:
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if type(value) is list:
        return [_without_nulls(inner) for inner in value]
    return value


# How to read each extension. To add one: a reader above, a line here, the extension in FORMATS.
READERS: dict[str, Callable[[Path, Account, Limit], Iterator[Record]]] = {
    ".txt": _text,
    ".md": _text,
    ".rst": _text,
    ".py": _text,
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
