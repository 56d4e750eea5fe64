"""Files to documents, streaming: memory does not grow with the size of a file.

Nothing is guessed and nothing vanishes. A byte that is not UTF-8, a line that is not JSON, a record
without the text field stop the reading with the place; a document without text is dropped and
counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.cuts import LONGEST_PART, MayCut, anywhere_safe, next_cut
from llmctl.data.builtin import BUILTIN
from llmctl.data.decode import decoded
from llmctl.data.document import Account, Document, Limit
from llmctl.data.records import DEFAULT_LIMIT, Record, kind, listed, parquet_rows, records_in, shown
from llmctl.data.sources import BUILTIN_PREFIX, file_format, open_bytes, resolve
from llmctl.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow.parquet as pq

__all__ = ["Account", "Document", "documents", "resolve"]

BLANK = "no text in it"
NULL = "the text is null"
SURROGATE = "half a surrogate pair, which is not text"
FIELD_HINT = "say which field holds the text, as in data.text_field={}"
UNCUT = "no place to cut within {:,} characters ({}): one token there may differ from those of the whole text"

HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs


def documents(
    sources: Iterable[str | Path],
    text_field: str,
    account: Account,
    limit: Limit = DEFAULT_LIMIT,
    may_cut: MayCut = anywhere_safe,
) -> Iterator[Document]:
    """Every document of the sources, in order, while `account` counts them; a long one in parts.

    Args:
        sources: as for `resolve`.
        text_field: the key or column of the text in json, jsonl, csv and parquet files.
        limit: of a record; a text file is read in parts and may be of any size.
        may_cut: as in `cuts`.

    Raises:
        UserError: as `resolve`; or, while reading, the first thing that is wrong with a file; or, at
            the end, that no document had any text.
    """
    items = resolve(sources)
    for item in items:
        if isinstance(item, str):
            found = _of_builtin(item, account)
        elif file_format(item) in TEXTS:
            found = _text(item, account, may_cut)
        else:
            found = READERS[file_format(item) or ""](item, text_field, account, limit)
        for document in found:
            yield from _in_parts(document, account, may_cut)
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
    place = document.place
    if not document.text or document.text.isspace():
        account.drop(BLANK, place)
        return
    if HALVES.search(document.text):  # a copy in UTF-8 would tell as well, but take as much memory again
        account.drop(SURROGATE, place)
        return
    account.keep()
    yield document


def _in_parts(document: Document, account: Account, may_cut: MayCut) -> Iterator[Document]:
    """The document, in parts if it is long and not a part already."""
    text, begin = document.text, 0
    while document.starts and document.ends and (found := next_cut(text, begin, may_cut)) is not None:
        cut, exact = found
        if not exact:
            account.note(UNCUT.format(LONGEST_PART, document.place))
        yield replace(document, text=text[begin:cut], starts=begin == 0, ends=False)
        begin = cut
    yield replace(document, text=text[begin:], starts=False) if begin else document


def _text(path: Path, account: Account, may_cut: MayCut) -> Iterator[Document]:
    """One document a file; a long one in parts. Line ends stay as they are."""
    held, starts = "", True
    with open_bytes(path, account) as stream:
        for text in decoded(path, stream):
            held += text
            begin = 0
            while (found := next_cut(held, begin, may_cut)) is not None:
                cut, exact = found
                if starts:
                    account.keep()
                if not exact:
                    account.note(UNCUT.format(LONGEST_PART, path))
                yield Document(held[begin:cut], str(path), None, starts=starts, ends=False)
                begin, starts = cut, False
            held = held[begin:]
    if starts:
        yield from _checked(Document(held, str(path), None), account)
    else:
        yield Document(held, str(path), None, starts=False)


def _field(path: Path, text_field: str, account: Account, limit: Limit) -> Iterator[Document]:
    """One field of each record."""
    for record in records_in(path, account, limit):
        if text_field not in record.value:
            raise _no_field(record.place, text_field, list(record.value))
        yield from _of_record(record, text_field, account)


def _column(path: Path, text_field: str, account: Account, limit: Limit) -> Iterator[Document]:
    """One column of each row; the others are not decoded."""

    def column(file: pq.ParquetFile) -> list[str]:
        _check_column(path, file, text_field)
        return [text_field]

    for record in parquet_rows(path, account, column, limit):
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


# How to read each extension. To add one: a line in TEXTS, or a reader above and a line here; the extension in FORMATS.
TEXTS = (".txt", ".md", ".rst", ".py")
READERS: dict[str, Callable[[Path, str, Account, Limit], Iterator[Document]]] = {
    ".json": _field,
    ".jsonl": _field,
    ".csv": _field,
    ".parquet": _column,
}
