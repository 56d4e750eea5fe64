"""From a file's bytes to its text: UTF-8, or an error that says where it is not."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmctl.errors import UserError

BLOCK = 1 << 18  # bytes read at a time

BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# How files begin that are not text, whatever they are called; and the ending that says so.
MAGIC = {
    b"\x1f\x8b\x08": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"PAR1": ("parquet", ".parquet"),
}


def decoded(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The stream as text, a block at a time; a character may lie across two blocks.

    Raises UserError: bytes that are not UTF-8.
    """
    offset, pending = 0, b""
    while block := stream.read(BLOCK):
        if offset == 0 and not pending:
            raw = without_bom(path, block)
            offset = len(block) - len(raw)
        else:
            raw = pending + block
        try:
            text, pending = raw.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise not_utf8(path, offset + error.start) from None
            text, pending = raw[: error.start].decode(), raw[error.start :]
        offset += len(raw) - len(pending)
        yield text
    if pending:
        raise not_utf8(path, offset)


def lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The stream as lines of text with their ends, cut at line feeds only.

    Raises UserError: bytes that are not UTF-8.
    """
    offset = 0
    for number, raw in enumerate(stream, start=1):
        line = without_bom(path, raw) if number == 1 else raw
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + len(raw) - len(line) + error.start) from None
        offset += len(raw)
        yield text


def without_bom(path: Path, first: bytes) -> bytes:
    """The first bytes of a file without a UTF-8 mark; what is plainly not UTF-8 text is an error."""
    for bom, name in BOMS.items():
        if first.startswith(bom):
            raise UserError(
                f"{path}: the file is {name}, not UTF-8 (byte order mark at offset 0)",
                f"convert it: iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}",
            )
    for magic, (name, ending) in MAGIC.items():
        if first.startswith(magic):
            raise UserError(
                f"{path}: the file is {name}, which its name does not say",
                f"rename it so that it ends in {ending}",
            )
    nulls = first.count(0)
    if nulls > len(first) // 4:  # every other byte of western text in UTF-16
        raise UserError(
            f"{path}: the file looks like UTF-16 without a byte order mark (zero byte at offset {first.index(0)})",
            f"convert it: iconv -f UTF-16LE -t UTF-8 {path.name} > utf8-{path.name}",
        )
    return first.removeprefix(codecs.BOM_UTF8)


def not_utf8(path: Path, offset: int) -> UserError:
    """The error that `path` holds something else at a byte offset, counted in the unpacked file."""
    where = "in the unpacked file" if path.suffix.lower() in (".gz", ".zst") else "in the file"
    return UserError(
        f"{path}: not UTF-8 at byte offset {offset} {where}",
        "convert it, as in `iconv -f ISO-8859-1 -t UTF-8`, or cut those bytes out",
    )
