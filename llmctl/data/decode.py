"""From a file's bytes to its text: UTF-8, or an error that says where it is not."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmctl.data.document import Limit
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


def lines(path: Path, stream: BinaryIO, limit: Limit) -> Iterator[str]:
    """The stream as lines of text with their ends, cut at line feeds only.

    Raises UserError: bytes that are not UTF-8, or a line that is longer than `limit`.
    """
    offset, number = 0, 0
    while raw := stream.readline(limit.bytes + 2):
        number += 1
        size = len(raw)
        if size > limit.bytes and len(raw.rstrip(b"\r\n")) > limit.bytes:
            raise limit.exceeded(f"{path}:{number}", "the line")
        if number == 1:
            raw = without_bom(path, raw)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + size - len(raw) + error.start) from None
        offset += size
        del raw  # a long line is held once, not twice
        yield text


def without_bom(path: Path, first: bytes) -> bytes:
    """The first bytes of a file without a UTF-8 mark; what is plainly not UTF-8 text is an error."""
    for bom, name in BOMS.items():
        if first.startswith(bom):
            raise UserError(
                f"{path}: the file is {name}, not UTF-8 (byte order mark at offset 0)",
                f"convert it: {_iconv(path, name)}",
            )
    for magic, (name, ending) in MAGIC.items():
        if first.startswith(magic):
            raise UserError(
                f"{path}: the file is {name}, which its name does not say",
                f"rename it so that it ends in {ending}",
            )
    if (nulls := first.count(0)) > len(first) // 4:
        raise _zeros(path, first[:BLOCK], nulls == len(first))
    return first.removeprefix(codecs.BOM_UTF8)


def _zeros(path: Path, first: bytes, only: bool) -> UserError:
    """What a file is that begins with many zero bytes."""
    if only:
        return UserError(
            f"{path}: begins with {len(first):,} zero bytes: it was never written, or the disk was full",
            "make or download it again",
        )
    at_even, at_odd = (first[parity::2].count(0) for parity in (0, 1))
    # every other byte of western text in UTF-16
    if max(at_even, at_odd) > 4 * min(at_even, at_odd):
        name = "UTF-16LE" if at_odd > at_even else "UTF-16BE"
        return UserError(
            f"{path}: the file looks like UTF-16 without a byte order mark (zero byte at offset {first.index(0)})",
            f"convert it: {_iconv(path, name)}",
        )
    return UserError(
        f"{path}: binary data, not text (zero byte at offset {first.index(0)})",
        f"look at it with `file {path.name}`; known are text, json, jsonl, csv and parquet",
    )


# How to unpack and pack a file in a shell, by its ending.
PACKERS = {".gz": ("zcat", "gzip"), ".zst": ("zstdcat", "zstd")}


def _iconv(path: Path, encoding: str) -> str:
    """The shell command that converts a file, compressed or not."""
    convert, name = f"iconv -f {encoding} -t UTF-8", path.name
    if path.suffix.lower() not in PACKERS:
        return f"{convert} {name} > utf8-{name}"
    unpack, pack = PACKERS[path.suffix.lower()]
    return f"{unpack} {name} | {convert} | {pack} > utf8-{name}"


def not_utf8(path: Path, offset: int) -> UserError:
    """The error that `path` holds something else at a byte offset, counted in the unpacked file."""
    packed = path.suffix.lower() in PACKERS
    where = "in the unpacked file" if packed else "in the file"
    return UserError(
        f"{path}: not UTF-8 at byte offset {offset} {where}",
        f"convert it, as in `{_iconv(path, 'ISO-8859-1')}`, or cut those bytes out"
        if packed
        else "convert it, as in `iconv -f ISO-8859-1 -t UTF-8`, or cut those bytes out",
    )
