"""Data that cannot be read, through the real command line: what it says, and that nothing is left behind."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from tests.program import Program
from tests.stages.bad_input import (
    Bad,
    cases,
    check,
    file,
    folder,
)
from tests.stages.conftest import SHORT, SMALL


def on(data: str) -> str:
    """A pretraining on this data."""
    return f"pretrain --tokenizer tok --data {data} --out out {' '.join(SMALL + SHORT)}"


KNOWN = "known are `.txt`, `.md`, `.rst`, `.py`, `.json`, `.jsonl`, `.csv`, `.parquet`"
AGAIN = "copy or download it again"
CONVERT = "convert it, as in `iconv -f ISO-8859-1 -t UTF-8`, or cut those bytes out"
MIXED_UP = "say which field holds the text, as in data.text_field"

DATA = {
    "none named": Bad(
        f"pretrain --tokenizer tok --out out {' '.join(SMALL)}",
        "no data to train on",
        "name files with --data, or try --data builtin:tinyworld",
    ),
    "missing file": Bad(on("data.json"), "data.json: no such file or folder", "did you mean `data.jsonl`?"),
    "missing file like no other": Bad(
        on("no.txt"),
        "no.txt: no such file or folder",
        "check the path; it is taken from the folder you are in",
    ),
    "no match": Bad(on("*.txt"), "*.txt: no file matches", "check the pattern; ** crosses folders"),
    "empty file": Bad(
        on("x.txt"),
        "x.txt: the file is empty",
        "check how it was made, or leave it out",
        file("x.txt", ""),
    ),
    "folder where a file belongs": Bad(
        on("x.jsonl"), "x.jsonl: the folder holds no data files", KNOWN, folder("x.jsonl")
    ),
    "unknown extension": Bad(
        on("x.doc"),
        "x.doc: cannot tell how to read `.doc` files",
        f"{KNOWN}, each also with .gz or .zst; rename or convert it",
        file("x.doc", "text"),
    ),
    "unknown builtin": Bad(
        on("builtin:tinyword"),
        "builtin:tinyword: no such builtin data; there is `builtin:pydoc`, `builtin:tinyworld`",
        "did you mean `builtin:tinyworld`?",
    ),
    "named twice": Bad(
        on("data.jsonl --data ./data.jsonl"),
        "data.jsonl: named by data.jsonl and by ./data.jsonl",
        "name each file once; num_train_epochs repeats all of them",
    ),
    "invalid JSON": Bad(
        on("x.jsonl"),
        "x.jsonl:3: invalid JSON (expecting ',' delimiter, column 13)",
        "a jsonl file holds one JSON object a line; mend or delete this line",
        file("x.jsonl", '{"text": "a"}\n\n{"text": "b"\n'),
    ),
    "not an object": Bad(
        on("x.jsonl"),
        "x.jsonl:2: the line holds a list, not an object",
        'a jsonl file holds one object a line, as {"text": "…"}',
        file("x.jsonl", '{"text": "a"}\n["b"]\n'),
    ),
    "another field": Bad(
        on("x.jsonl"),
        "x.jsonl:1: no field `text`; there is `txt`",
        f"{MIXED_UP}=txt",
        file("x.jsonl", '{"txt": "a"}\n'),
    ),
    "a number for a text": Bad(
        on("x.jsonl"),
        "x.jsonl:1: `text` is a number, not text",
        f"{MIXED_UP}=NAME",
        file("x.jsonl", '{"text": 5}\n'),
    ),
    "not UTF-8": Bad(
        on("x.txt"), "x.txt: not UTF-8 at byte offset 4 in the file", CONVERT, file("x.txt", b"good\xffbad")
    ),
    "not UTF-8 in jsonl": Bad(
        on("x.jsonl"),
        "x.jsonl: not UTF-8 at byte offset 24 in the file",
        CONVERT,
        file("x.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n'),
    ),
    "UTF-16": Bad(
        on("x.txt"),
        "x.txt: the file is UTF-16, not UTF-8 (byte order mark at offset 0)",
        "convert it: iconv -f UTF-16 -t UTF-8 x.txt > utf8-x.txt",
        file("x.txt", b"\xff\xfe" + "hello".encode("utf-16-le")),
    ),
    "UTF-16 in jsonl": Bad(
        on("x.jsonl"),
        "x.jsonl: the file is UTF-16, not UTF-8 (byte order mark at offset 0)",
        "convert it: iconv -f UTF-16 -t UTF-8 x.jsonl > utf8-x.jsonl",
        file("x.jsonl", b"\xff\xfe" + '{"text": "a"}\n'.encode("utf-16-le")),
    ),
    "UTF-16 without a mark": Bad(
        on("x.txt"),
        "x.txt: the file looks like UTF-16 without a byte order mark (zero byte at offset 1)",
        "convert it: iconv -f UTF-16LE -t UTF-8 x.txt > utf8-x.txt",
        file("x.txt", "hello".encode("utf-16-le")),
    ),
    "no usable text": Bad(
        on("x.txt"),
        "x.txt: no usable text (read 1 document, kept 0; dropped 1: no text in it (x.txt))",
        "check the files and data.text_field",
        file("x.txt", " \n\n "),
    ),
    "no usable text in jsonl": Bad(
        on("x.jsonl"),
        "x.jsonl: no usable text (read 2 documents, kept 0; dropped 1: no text in it (x.jsonl:1); "
        "dropped 1: the text is null (x.jsonl:2))",
        "check the files and data.text_field",
        file("x.jsonl", '{"text": ""}\n{"text": null}\n'),
    ),
    "truncated gzip": Bad(
        on("x.txt.gz"),
        "x.txt.gz: the compressed file is truncated",
        f"{AGAIN}; nothing was used of it",
        file("x.txt.gz", gzip.compress(os.urandom(2000).hex().encode())[:900]),
    ),
    "not gzip": Bad(
        on("x.txt.gz"),
        "x.txt.gz: not a gzip file, or a damaged one",
        f"{AGAIN}; `gzip -t` tests it",
        file("x.txt.gz", "plain text"),
    ),
    "not parquet": Bad(
        on("x.parquet"),
        "x.parquet: not a parquet file, or a damaged one (parquet magic bytes not found in footer. "
        "Either the file is corrupted or this is not a parquet file)",
        AGAIN,
        file("x.parquet", "PAR1 and nothing of the kind"),
    ),
    "no data to score": Bad("eval base", "no data to score", "name files with --data FILE"),
    "nothing to learn from": Bad(
        "tokenizer train --out out",
        "no data to learn from",
        "name files, for example `llmctl tokenizer train TEXT.txt`",
        code=2,
    ),
}


@cases(DATA)
def test_data(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


@pytest.mark.parametrize("command", ["tokenizer train", "eval base --data"])
@pytest.mark.parametrize(
    "name",
    ["missing file", "empty file", "invalid JSON", "not UTF-8", "UTF-16", "no usable text", "truncated gzip"],
)
def test_data_of_other_commands(name: str, command: str, stocked: Path, llmctl: Program) -> None:
    """All stages read with the same readers; a tokenizer run writes nothing either."""
    bad = DATA[name]
    data = bad.words.split()[4]
    words = f"{command} {data}" + (" --out out" if command.startswith("tokenizer") else "")
    check(Bad(words, bad.error, bad.hint, bad.make), stocked, llmctl)
