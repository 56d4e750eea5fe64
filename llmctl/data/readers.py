"""Files to documents, streaming: memory does not grow with the size of a file.

Nothing is guessed and nothing vanishes. A byte that is not UTF-8, a line that is not JSON, a record
without the text field stop the reading with the place; a document without text is dropped and
counted.
"""

from __future__ import annotations

import codecs
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmctl.data.builtin import BUILTIN
from llmctl.data.document import Account, Document
from llmctl.data.sources import BUILTIN_PREFIX, file_format, open_bytes, reading, resolve
from llmctl.errors import UserError, nearest, one_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["Account", "Document", "documents", "resolve"]

BLOCK = 1 << 18  # bytes read at a time
PART = 1 << 18  # characters after which a long text is cut into parts
LONGEST_PART = 1 << 22  # characters after which it is cut even where that may change a token
PARQUET_ROWS = 256  # rows decoded at a time

BLANK = "no text in it"
NULL = "the text is null"
SURROGATE = "half a surrogate pair, which is not text"
FIELD_HINT = "say which field holds the text, as in data.text_field={}"

# Where a text may be cut so that byte-level BPE gives the same ids for the parts as for the whole: the
# pre-tokenizers of GPT-2, Llama 3, Qwen 2 and GPT-4o all end a piece at these places. A cut after a
# run of several newlines would not do: GPT-2 keeps the last one apart if a letter follows.
SAFE_CUTS = (
    re.compile(r"(?<=\S\n)(?=[^\W_])"),  # after a single newline, before a letter or digit
    re.compile(r"(?<=\S)(?= [^\W_])"),  # before a single space that begins a word
    re.compile(r"(?<=[^\W_])(?=[。！？；，、][^\W_])"),  # scripts without spaces: before punctuation
)
BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def documents(sources: Iterable[str | Path], text_field: str, account: Account) -> Iterator[Document]:
    """Every document of the sources, in order, while `account` counts them.

    Args:
        sources: as for `resolve`.
        text_field: the key or column of the text in jsonl and parquet files.

    Raises:
        UserError: as `resolve`; or, while reading, the first thing that is wrong with a file; or, at
            the end, that no document had any text.
    """
    items = resolve(sources)
    for item in items:
        if isinstance(item, str):
            yield from _of_builtin(item, account)
        else:
            yield from READERS[file_format(item) or ""](item, text_field, account)
    if account.kept == 0:
        named = str(items[0]) if len(items) == 1 else f"{len(items)} files"
        raise UserError(
            f"{named}: no usable text ({'; '.join(account.lines())})", "check the files and data.text_field"
        )


def _of_builtin(name: str, account: Account) -> Iterator[Document]:
    for document in BUILTIN[name.removeprefix(BUILTIN_PREFIX)].documents(account):
        account.input_bytes += len(document.text.encode("utf-8", "surrogatepass"))
        yield from _checked(document, account)


def _checked(document: Document, account: Account) -> Iterator[Document]:
    """The document, if it has text that can be written as UTF-8; either way it is counted."""
    place = document.source if document.line is None else f"{document.source}:{document.line}"
    if not document.text or document.text.isspace():
        account.drop(BLANK, place)
        return
    try:
        document.text.encode()
    except UnicodeEncodeError:
        account.drop(SURROGATE, place)
        return
    account.keep()
    yield document


def _text(path: Path, text_field: str, account: Account) -> Iterator[Document]:
    """One document a file; a long one in parts. Line ends stay as they are."""
    held, starts = "", True
    with open_bytes(path, account) as stream:
        for text in _decoded(path, stream):
            held += text
            cut = _cut(held)
            if cut is None:
                continue
            if starts:
                account.keep()
            yield Document(held[:cut], str(path), None, starts=starts, ends=False)
            held, starts = held[cut:], False
    if starts:
        yield from _checked(Document(held, str(path), None), account)
    else:
        yield Document(held, str(path), None, starts=False)


def _decoded(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The stream as UTF-8 text, a block at a time; a character may lie across two blocks."""
    offset, pending = 0, b""
    while block := stream.read(BLOCK):
        if offset == 0 and not pending:
            raw = _without_bom(path, block)
            offset = len(block) - len(raw)
        else:
            raw = pending + block
        try:
            text, pending = raw.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise _not_utf8(path, offset + error.start) from None
            text, pending = raw[: error.start].decode(), raw[error.start :]
        offset += len(raw) - len(pending)
        yield text
    if pending:
        raise _not_utf8(path, offset)


def _cut(text: str) -> int | None:
    """Where to end a part, as near to the end of `text` as a safe place lies; None to read on."""
    if len(text) < PART:
        return None
    for begin in (len(text) - len(text) // 8, 0):
        for pattern in SAFE_CUTS:
            places = [match.start() for match in pattern.finditer(text, begin)]
            if places and places[-1] > 0:
                return places[-1]
    return len(text) - 1 if len(text) >= LONGEST_PART else None


def _jsonl(path: Path, text_field: str, account: Account) -> Iterator[Document]:
    """One object a line. Lines without anything on them are not records."""
    offset = 0
    with open_bytes(path, account) as stream:
        for number, raw in enumerate(stream, start=1):
            line = _without_bom(path, raw) if number == 1 else raw
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + len(raw) - len(line) + error.start) from None
            offset += len(raw)
            if not text.isspace() and text:
                yield from _record(path, number, text, text_field, account)


def _record(path: Path, number: int, line: str, text_field: str, account: Account) -> Iterator[Document]:
    try:
        record = json.loads(line.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f"{path}:{number}: invalid JSON ({what[:1].lower()}{what[1:]})",
            "a jsonl file holds one JSON object a line; mend or delete this line",
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}:{number}: the line holds {_kind(record)}, not an object",
            'a jsonl file holds one object a line, as {"text": "…"}',
        )
    if text_field not in record:
        raise _no_field(f"{path}:{number}", text_field, list(record))
    text = record[text_field]
    if text is None:
        account.drop(NULL, f"{path}:{number}")
    elif not isinstance(text, str):
        raise UserError(
            f"{path}:{number}: `{text_field}` is {_kind(text)}, not text", FIELD_HINT.format("NAME")
        )
    else:
        yield from _checked(Document(text, str(path), number), account)


def _parquet(path: Path, text_field: str, account: Account) -> Iterator[Document]:
    """One row a document, decoded a few hundred rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path), tempfile.TemporaryFile() as unpacked:
        size = path.stat().st_size
        compressed = path.suffix.lower() != ".parquet"
        if compressed:
            # parquet is read from its end, a compressed stream only from its beginning
            with open_bytes(path, Account()) as stream:
                shutil.copyfileobj(stream, unpacked)
        try:
            with pq.ParquetFile(unpacked if compressed else path, buffer_size=BLOCK) as file:
                _check_column(path, file, text_field)
                share = size / max(1, file.metadata.num_rows)
                number, before = 0, account.input_bytes
                for batch in _row_batches(file, text_field):
                    for value in batch.column(0):
                        number += 1
                        text = value.as_py()
                        if text is None:
                            account.drop(NULL, f"{path}:{number}")
                        else:
                            yield from _checked(Document(text, str(path), number), account)
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


def _row_batches(file: pq.ParquetFile, text_field: str) -> Iterator[pa.RecordBatch]:
    # One row group after the other: a single iterator over all of them holds on to what it has read.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(
            PARQUET_ROWS, row_groups=[group], columns=[text_field], use_threads=False
        )


def _check_column(path: Path, file: pq.ParquetFile, text_field: str) -> None:
    import pyarrow.types as kinds

    if text_field not in file.schema_arrow.names:
        raise _no_field(str(path), text_field, file.schema_arrow.names)
    kind = file.schema_arrow.field(text_field).type
    plain = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(plain) or kinds.is_large_string(plain) or kinds.is_string_view(plain)):
        raise UserError(
            f"{path}: the column `{text_field}` is {kind}, not text",
            FIELD_HINT.format("NAME") + f"; there is {one_of(file.schema_arrow.names)}",
        )


def _no_field(place: str, text_field: str, names: list[str]) -> UserError:
    close = nearest(text_field, names)
    return UserError(
        f"{place}: no field `{text_field}`; there is {one_of(names) if names else 'nothing'}",
        FIELD_HINT.format(close or "NAME"),
    )


def _without_bom(path: Path, first: bytes) -> bytes:
    """The first bytes of a file without a UTF-8 mark; a UTF-16 or UTF-32 mark is an error."""
    for bom, name in BOMS.items():
        if first.startswith(bom):
            raise UserError(
                f"{path}: the file is {name}, not UTF-8 (byte order mark at offset 0)",
                f"convert it: iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}",
            )
    nulls = first.count(0)
    if nulls > len(first) // 4:  # every other byte of western text in UTF-16
        raise UserError(
            f"{path}: the file looks like UTF-16 without a byte order mark (zero byte at offset {first.index(0)})",
            f"convert it: iconv -f UTF-16LE -t UTF-8 {path.name} > utf8-{path.name}",
        )
    return first.removeprefix(codecs.BOM_UTF8)


def _not_utf8(path: Path, offset: int) -> UserError:
    where = "in the unpacked file" if path.suffix.lower() in (".gz", ".zst") else "in the file"
    return UserError(
        f"{path}: not UTF-8 at byte offset {offset} {where}",
        "convert it, as in `iconv -f ISO-8859-1 -t UTF-8`, or cut those bytes out",
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# How to read each extension. To add one: a reader above, a line here, the extension in FORMATS.
READERS: dict[str, Callable[[Path, str, Account], Iterator[Document]]] = {
    ".txt": _text,
    ".md": _text,
    ".rst": _text,
    ".py": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
