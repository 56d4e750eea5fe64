"""Files to records, streaming: objects of a JSON array, lines of jsonl, rows of csv and parquet.

A record is a dict and the place it came from. What a file should hold and does not stops the reading,
with the line. What the keys mean is no matter here: see `formats` for examples, `readers` for text.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmctl.data.array import Array, why_not
from llmctl.data.builtin import BUILTIN, BUILTIN_RECORDS
from llmctl.data.decode import BLOCK, decoded, lines
from llmctl.data.document import Account
from llmctl.data.sources import BUILTIN_PREFIX, file_format, open_bytes, reading, resolve
from llmctl.errors import UserError, one_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PARQUET_ROWS = 256  # rows decoded at a time
MOST_NAMES, LONGEST_NAME = 20, 60  # keys in a message, characters in one of them
LONGEST_CELL = 1 << 26  # characters in a cell of a csv file; the csv module's own limit is 1 << 17


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


def records(sources: Iterable[str | Path], account: Account) -> Iterator[Record]:
    """Every record of the sources, in order. A text file or a text of a builtin is {"text": …}.

    `account` counts the bytes, and what a builtin leaves out; whether a record is kept, the caller
    tells it.

    Raises:
        UserError: as `resolve`; or, while reading, the first thing that is wrong with a file.
    """
    for item in resolve(sources, "records"):
        yield from records_in(item, account)


def records_in(item: Path | str, account: Account) -> Iterator[Record]:
    """The records of one thing that `resolve` found."""
    if isinstance(item, str):
        return _of_builtin(item, account)
    return READERS[file_format(item) or ""](item, account)


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


def shown(name: str) -> str:
    """A key of a record as the messages print it: short, and without what does not print."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[: LONGEST_NAME + 1])
    return printable if len(printable) <= LONGEST_NAME else f"{printable[:LONGEST_NAME]}…"


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


def _text(path: Path, account: Account) -> Iterator[Record]:
    with open_bytes(path, account) as stream:
        yield Record({"text": "".join(decoded(path, stream))}, str(path), 1)


# --- JSON -------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key `{shown(key)}` is given twice")
            seen.add(key)
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


# Strict where Python's own is lenient: it would take the last of two equal keys, and NaN.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)


def _json(path: Path, account: Account) -> Iterator[Record]:
    source = str(path)
    with open_bytes(path, account) as stream:
        for line, column, value in Array(path, decoded(path, stream), DECODER):
            yield Record(value, source, line, column)


def _jsonl(path: Path, account: Account) -> Iterator[Record]:
    """One object a line. Lines without anything on them are not records."""
    source = str(path)
    with open_bytes(path, account) as stream:
        for number, line in enumerate(lines(path, stream), start=1):
            if not line or line.isspace():
                continue
            try:
                value = DECODER.decode(line.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                array = number == 1 and line.lstrip().startswith("[")
                raise UserError(
                    f"{path}:{number}: invalid JSON ({why_not(error)})",
                    "a jsonl file holds one JSON object a line; "
                    + ("rename it to .json if it is one list" if array else "mend or delete this line"),
                ) from None
            if type(value) is not dict:
                raise UserError(
                    f"{path}:{number}: the line holds {kind(value)}, not an object",
                    'a jsonl file holds one object a line, as {"text": "…"}',
                )
            yield Record(value, source, number)


# --- csv --------------------------------------------------------------------------------------------


def _csv(path: Path, account: Account) -> Iterator[Record]:
    """One record a row, its keys from the first row. All values are strings."""
    csv.field_size_limit(LONGEST_CELL)
    source, begins = str(path), 1
    with open_bytes(path, account) as stream:
        rows = csv.reader(lines(path, stream), strict=True)
        try:
            header = next((row for row in rows if row), [])
            _check_header(path, header)
            begins = rows.line_num + 1
            for row in rows:
                if len(row) == len(header):
                    yield Record(dict(zip(header, row, strict=True)), source, begins)
                elif row:
                    raise UserError(
                        f"{path}:{begins}: {len(row)} cells, but the header has {len(header)}",
                        'a cell with a comma, a quote or a line break in it stands in "quotes"',
                    )
                begins = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{begins}: not a csv record ({str(error).split(' - ')[0]})",
                'cells stand between commas; inside a cell in "quotes" a quote is doubled, as ""',
            ) from None


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


def _parquet(path: Path, account: Account) -> Iterator[Record]:
    def all_columns(file: pq.ParquetFile) -> list[str]:
        names: list[str] = file.schema_arrow.names
        _check_names(str(path), names)
        return names

    return parquet_rows(path, account, all_columns)


def parquet_rows(
    path: Path, account: Account, columns: Callable[[pq.ParquetFile], list[str]]
) -> Iterator[Record]:
    """One record a row, decoded a few hundred rows at a time.

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
                shutil.copyfileobj(stream, unpacked)
        try:
            with pq.ParquetFile(unpacked if compressed else path, buffer_size=BLOCK) as file:
                wanted = columns(file)
                share = size / max(1, file.metadata.num_rows)
                before = account.input_bytes
                for batch in _row_batches(file, wanted):
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


def _row_batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # One row group after the other: a single iterator over all of them holds on to what it has read.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False)


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
READERS: dict[str, Callable[[Path, Account], Iterator[Record]]] = {
    ".txt": _text,
    ".md": _text,
    ".rst": _text,
    ".py": _text,
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
