"""Files to documents, streaming: memory does not grow with the size of a file.

Nothing is guessed and nothing vanishes. A byte that is not UTF-8, a line that is not JSON, a record
without the text field stop the reading with the place; a document without text is dropped and
counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.data.builtin import BUILTIN
from llmctl.data.decode import decoded
from llmctl.data.document import Account, Document
from llmctl.data.records import Record, kind, listed, parquet_rows, records_in, shown
from llmctl.data.sources import BUILTIN_PREFIX, file_format, open_bytes, resolve
from llmctl.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow.parquet as pq

__all__ = ["Account", "Document", "documents", "resolve"]

PART = 1 << 18  # characters after which a long text is cut into parts
LONGEST_PART = 1 << 22  # characters after which it is cut even where that may change a token

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


def documents(sources: Iterable[str | Path], text_field: str, account: Account) -> Iterator[Document]:
    """Every document of the sources, in order, while `account` counts them.

    Args:
        sources: as for `resolve`.
        text_field: the key or column of the text in json, jsonl, csv and parquet files.

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
        for text in decoded(path, stream):
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


def _field(path: Path, text_field: str, account: Account) -> Iterator[Document]:
    """One field of each record."""
    for record in records_in(path, account):
        if text_field not in record.value:
            raise _no_field(record.place, text_field, list(record.value))
        yield from _of_record(record, text_field, account)


def _column(path: Path, text_field: str, account: Account) -> Iterator[Document]:
    """One column of each row; the others are not decoded."""

    def column(file: pq.ParquetFile) -> list[str]:
        _check_column(path, file, text_field)
        return [text_field]

    for record in parquet_rows(path, account, column):
        yield from _of_record(record, text_field, account)


def _of_record(record: Record, text_field: str, account: Account) -> Iterator[Document]:
    text = record.value[text_field]
    if text is None:
        account.drop(NULL, record.place)
    elif not isinstance(text, str):
        raise UserError(
            f"{record.place}: `{text_field}` is {kind(text)}, not text",
            FIELD_HINT.format("NAME"),
        )
    else:
        yield from _checked(Document(text, record.source, record.line), account)


def _check_column(path: Path, file: pq.ParquetFile, text_field: str) -> None:
    import pyarrow.types as kinds

    if text_field not in file.schema_arrow.names:
        raise _no_field(str(path), text_field, file.schema_arrow.names)
    stored = file.schema_arrow.field(text_field).type
    plain = stored.value_type if kinds.is_dictionary(stored) else stored
    if not (kinds.is_string(plain) or kinds.is_large_string(plain) or kinds.is_string_view(plain)):
        raise UserError(
            f"{path}: the column `{text_field}` is {stored}, not text",
            FIELD_HINT.format("NAME") + f"; there is {listed(file.schema_arrow.names)}",
        )


def _no_field(place: str, text_field: str, names: list[str]) -> UserError:
    close = nearest(text_field, names)
    return UserError(
        f"{place}: no field `{text_field}`; there is {listed(names) if names else 'nothing'}",
        FIELD_HINT.format(shown(close or "NAME")),
    )


# How to read each extension. To add one: a reader above, a line here, the extension in FORMATS.
READERS: dict[str, Callable[[Path, str, Account], Iterator[Document]]] = {
    ".txt": _text,
    ".md": _text,
    ".rst": _text,
    ".py": _text,
    ".json": _field,
    ".jsonl": _field,
    ".csv": _field,
    ".parquet": _column,
}
