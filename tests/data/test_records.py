"""Records: what a file holds comes out once with its place, and what it should not hold is said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.data import decode, tinyworld
from llmctl.data.document import Account
from llmctl.data.readers import documents
from llmctl.data.records import Record, records
from llmctl.errors import UserError


def read(*names: object) -> list[Record]:
    return list(records([str(name) for name in names], Account()))


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def flipped(data: bytes) -> bytes:
    """A gzip file with a bit of its middle turned: what comes out is bad text before the checksum tells."""
    raw = bytearray(gzip.compress(data, compresslevel=0, mtime=0))
    raw[len(raw) // 2] ^= 0x80
    return bytes(raw)


AB = [({"a": 1}, 1), ({"a": "é"}, 2)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", '[{"a": 1},\n{"a": "é"}]', AB),
        ("a.json", '\ufeff[\r\n  {"a": 1},\r\n  {\r\n  "a": "é"}\r\n]\r\n', [({"a": 1}, 2), ({"a": "é"}, 3)]),
        ("a.json", ' [ {"a": [1, {"b": null}]}\n ,\n\n {} ] ', [({"a": [1, {"b": None}]}, 1), ({}, 4)]),
        ("a.json", "[]", []),
        ("a.jsonl", '{"a": 1}\n{"a": "é"}', AB),
        ("a.jsonl", '\ufeff{"a": 1}\r\n\r\n {"a": "é"} \r\n', [({"a": 1}, 1), ({"a": "é"}, 3)]),
        ("a.csv", "a,b\n1,é\n", [({"a": "1", "b": "é"}, 2)]),
        (
            "a.csv",
            '\ufeffa,b\r\n"x\r\ny","q""q"\r\n\r\n,z',
            [({"a": "x\r\ny", "b": 'q"q'}, 2), ({"a": "", "b": "z"}, 5)],
        ),
        ("a.csv", "a\n", []),
        ("a.txt", "\ufeffone\r\ntwo", [({"text": "one\r\ntwo"}, 1)]),
        ("a.md", "# T", [({"text": "# T"}, 1)]),
    ],
)
def test_reads_every_format_packed_or_not(tmp_path, name, data, expected, pack):
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[pack]
    path = write(tmp_path, name + suffix, pack(data.encode()))
    account = Account()
    found = list(records([path], account))
    assert [(r.value, r.line) for r in found] == expected
    assert {r.source for r in found} <= {str(path)}
    assert account.input_bytes == path.stat().st_size


def test_reads_parquet_with_nested_columns(tmp_path):
    turns = [
        [{"role": "user", "content": "a", "calls": None}],
        [{"role": "user", "content": None, "calls": ["b"]}],
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": turns, "label": [True, None]}), path, row_group_size=1)
    expected = [
        # the fields of structs that are null are not there; a null column is null
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, 1),
        ({"messages": [{"role": "user", "calls": ["b"]}], "label": None}, 2),
    ]
    assert [(r.value, r.line) for r in read(path)] == expected
    packed = write(tmp_path, "b.parquet.gz", gzip.compress(path.read_bytes()))
    assert [(r.value, r.line) for r in read(packed)] == expected


def test_records_that_share_a_line_have_columns(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, {"a": 2},\n{"a": 3}]')
    assert [r.place for r in read(path)] == [f"{path}:1", f"{path}:1:12", f"{path}:2"]


def test_builtins():
    one = read("builtin:tinyworld-instructions")
    assert [r.value for r in one] == tinyworld.instructions("train")
    assert [r.value for r in read("builtin:tinyworld-instructions-heldout")] == tinyworld.instructions(
        "heldout"
    )
    assert [r.value for r in read("builtin:tinyworld-preferences")] == tinyworld.preferences("train")
    assert [r.value for r in read("builtin:tinyworld-preferences-heldout")] == tinyworld.preferences(
        "heldout"
    )
    assert one[6].place == "builtin:tinyworld-instructions:7"
    assert next(records(["builtin:tinyworld"], Account())).value == {"text": next(tinyworld.statements())}


def test_files_come_in_the_order_named(tmp_path):
    b = write(tmp_path, "b.jsonl", '{"n": 1}\n{"n": 2}')
    a = write(tmp_path, "a.csv", "n\n3\n")
    assert [r.value["n"] for r in read(b, a)] == [1, 2, "3"]


DEEP = "[" * 100_000
BAD = [
    # json
    ("a.json", "", "{p}: the file is empty", "leave it out"),
    ("a.json", " \n ", "{p}: nothing but white space", "leave it out"),
    ("a.json", '{"a": 1}', "{p}:1: the file begins with an object, not with a list", "is called .jsonl"),
    (
        "a.json",
        '\n{"data": []}',
        "{p}:2: the file begins with an object, not with a list",
        "is called .jsonl",
    ),
    ("a.json", '"a"', '{p}:1: the file begins with `"`, not with a list', "a list of objects"),
    ("a.json", '[{"a": 1},\n]', "{p}:2: a comma with no record after it", "delete the comma"),
    ("a.json", '[\n,{"a": 1}]', "{p}:2: a comma with no record before it", "delete the comma"),
    ("a.json", '[{"a": 1},,{"a": 1}]', "{p}:1:11: a comma with no record before it", "delete the comma"),
    (
        "a.json",
        '[{"a": 1}\n{"a": 2}]',
        "{p}:2: `{` where a comma or the closing `]` is expected",
        "put a comma between records",
    ),
    ("a.json", '[{"a": 1}}', "{p}:1:10: `}` where a comma or the closing `]` is expected", "comma"),
    ("a.json", "[{},\n[1]]", "{p}:2: the list holds a list where an object is expected", "mend or delete"),
    ("a.json", '[{},\n "b"]', "{p}:2: the list holds a string where an object is expected", "mend or delete"),
    ("a.json", "[{},\n null]", "{p}:2: the list holds null where an object is expected", "mend or delete"),
    ("a.json", "[true]", "{p}:1: the list holds a boolean where an object is expected", "mend or delete"),
    ("a.json", "[-1]", "{p}:1: the list holds a number where an object is expected", "mend or delete"),
    ("a.json", "[NaN]", "{p}:1: the list holds `N` where an object is expected", "mend or delete"),
    ("a.json", "[" + DEEP, "{p}:1: the list holds a list where", "mend or delete"),
    ("a.json", '[\n{"a": ' + DEEP, "{p}:2: invalid JSON (nested too deeply)", "mend or delete"),
    ("a.json", '[\n{"a": NaN}]', "{p}:2: invalid JSON (NaN is not JSON)", "mend or delete"),
    ("a.json", '[{"a": -Infinity}]', "{p}:1: invalid JSON (-Infinity is not JSON)", "mend or delete"),
    ("a.json", '[{"a": 1e999}]', "{p}:1: invalid JSON (the number 1e999 is too large)", "mend or delete"),
    (
        "a.json",
        '[{"a": ' + "9" * 5000 + "}]",
        "{p}:1: invalid JSON (an integer of thousands of digits)",
        "mend or delete",
    ),
    (
        "a.json",
        '[{},\n{"a": {"b": 1, "b": 2}}]',
        "{p}:2: invalid JSON (the key `b` is given twice)",
        "mend or delete",
    ),
    ("a.json", '[\n{"a":\n 1,}]', "{p}:3: invalid JSON (", "mend or delete"),
    ("a.json", "[\n{'a': 1}]", "{p}:2: invalid JSON (expecting property name", "mend or delete"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', "{p}:2: invalid JSON (expecting ':' delimiter, column 7)", "mend"),
    ("a.json", '[{"a": "x\ny"}]', "{p}:1: invalid JSON (invalid control character at, column 10)", "mend"),
    ("a.json", '[\n{"a": 1}', "{p}:2:9: the file ends inside the list", "download it again"),
    ("a.json", '[{"a": 1},\n', "{p}:2: the file ends inside the list", "download it again"),
    (
        "a.json",
        '[\n{"a":\n [1, ',
        "{p}:3: the file ends inside the record that begins on line 2",
        "download it again",
    ),
    ("a.json", '[{"a": "b', "{p}:1: the file ends inside the string that begins in column 8", "truncated"),
    ("a.json", "[{}]\n[{}]", "{p}:2: something follows the closing `]`", "one list"),
    (
        "a.json",
        '[{"a": "\udcff"}]'.encode("latin-1", "surrogateescape"),
        "{p}: not UTF-8 at byte offset 8",
        "iconv",
    ),
    ("a.json", "[{}]".encode("utf-16"), "{p}: the file is UTF-16, not UTF-8", "iconv -f UTF-16"),
    ("a.json", "[{}]".encode("utf-16-le"), "{p}: the file looks like UTF-16 without a byte order", "iconv"),
    ("a.json", gzip.compress(b"[]"), "{p}: the file is gzip, which its name does not say", "ends in .gz"),
    ("a.json.gz", b"[]", "{p}: not compressed, though its name ends in .gz", "rename it to a.json"),
    ("a.json.gz", gzip.compress(b"[{}]")[:-4], "{p}: the compressed file is truncated", "again"),
    # jsonl
    ("a.jsonl", '[\n{"a": 1}\n]', "{p}:1: invalid JSON (", "rename it to .json if it is one list"),
    ("a.jsonl", '[{"a": 1}]', "{p}:1: the line holds a list, not an object", "one object a line"),
    ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "{p}:2: invalid JSON (the key `a` is given twice)", "mend"),
    ("a.jsonl", '{"a": NaN}', "{p}:1: invalid JSON (NaN is not JSON)", "mend"),
    ("a.jsonl", '{"a": ' + DEEP, "{p}:1: invalid JSON (nested too deeply)", "mend"),
    (
        "a.jsonl",
        '{"a": ' + "9" * 5000 + "}",
        "{p}:1: invalid JSON (an integer of thousands of digits)",
        "mend",
    ),
    # csv
    ("a.csv", "\n\n", "{p}: the file holds no header line", "names the columns"),
    ("a.csv", "a,b\n1,2\n\n1,2,3\n", "{p}:4: 3 cells, but the header has 2", 'stands in "quotes"'),
    ("a.csv", 'a,b\n"x\ny",2\n1\n', "{p}:4: 1 cells, but the header has 2", 'stands in "quotes"'),
    ("a.csv", "a,a\n1,2\n", "{p}:1: two columns are called `a`", "rename or delete"),
    ("a.csv", "a;b\n1;2\n", "{p}:1: the cells stand between semicolons", "with commas"),
    ("a.csv", "a\tb\n1\t2\n", "{p}:1: the cells stand between tabs", "with commas"),
    (
        "a.csv",
        'a,b\n1,2\n1,"2\n1,2\n',
        "{p}:3: not a csv record (unexpected end of data)",
        "quote is doubled",
    ),
    ("a.csv", 'a,b\n"1"2,3\n', "{p}:2: not a csv record (", "quote is doubled"),
    ("a.csv", "a,b\r1,2\r", "{p}:1: lines end with a carriage return alone, not with a line feed", "tr '"),
    ("a.jsonl", '{"a": 1}\r{"a": 2}\r', "{p}:1: lines end with a carriage return alone", "tr '"),
    (
        "a.jsonl",
        b'{"a": 1}\n' + bytes(40),
        "{p}:2: the line holds zero bytes only: it was never written",
        "copy",
    ),
    ("a.jsonl.gz", b'{"a": 1}\n', "{p}: not compressed, though its name ends in .gz", "rename it to a.jsonl"),
    (
        "a.jsonl.gz",
        flipped(b'{"a": 1, "b": "some words"}\n' * 400),
        "{p}: not a gzip file, or a damaged one",
        "gzip -t",
    ),
    (
        "a.jsonl.gz",
        gzip.compress('{"a": 1}'.encode("utf-16")),
        "{p}: the file is UTF-16, not UTF-8",
        "zcat a.jsonl.gz | iconv -f UTF-16 -t UTF-8 | gzip > utf8-a.jsonl.gz",
    ),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"a": "\xe9"}\n'),
        "{p}: not UTF-8 at byte offset 7 in the unpacked",
        "zcat a.j",
    ),
    ("a.jsonl", bytes(40), "{p}: begins with 40 zero bytes: it was never written", "again"),
    (
        "a.jsonl",
        b"\x00\x00\x01\x02\x00\x00\x07\x09" * 9,
        "{p}: binary data, not text (zero byte at offset 0)",
        "file a.jsonl",
    ),
    ("a.csv", b"a,b\n1,\xff\n", "{p}: not UTF-8 at byte offset 6 in the file", "iconv"),
    ("a.csv", "a,b\n".encode("utf-16"), "{p}: the file is UTF-16, not UTF-8", "iconv"),
    # what its name does not say
    ("a.parquet", "[{}]", "{p}: not a parquet file, or a damaged one (", "again"),
    ("a.csv", b"PAR1....", "{p}: the file is parquet, which its name does not say", "ends in .parquet"),
    ("a.txt", zstd(b"text"), "{p}: the file is zstd, which its name does not say", "ends in .zst"),
    ("a.yaml", "a: 1", "{p}: cannot tell how to read `.yaml` files", "`.json`, `.jsonl`, `.csv`"),
]


@pytest.mark.parametrize(("name", "data", "message", "hint"), BAD)
def test_bad_file(tmp_path, name, data, message, hint):
    path = write(tmp_path, name, data)
    with pytest.raises(UserError) as caught:
        read(path)
    raised = caught.value
    assert raised.message.startswith(message.replace("{p}", str(path)))
    assert hint in (raised.hint or "")
    assert "\n" not in raised.message + str(raised.hint)
    assert raised.message[-1] != "."


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(UserError, match="two columns are called `a`"):
        read(path)


def test_records_of_a_builtin_are_no_text():
    with pytest.raises(UserError, match="builtin:tinyworld-instructions: holds records, not text"):
        next(documents(["builtin:tinyworld-instructions"], "text", Account()))


# --- reading in blocks ------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
STRINGS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(['"', "\\", "]", "},{", "\n"])
VALUES = st.recursive(
    SCALARS | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(STRINGS, VALUES, max_size=4), max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=OBJECTS, block=st.integers(1, 40), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans()
)
def test_an_array_is_read_the_same_in_blocks_of_any_size(
    tmp_path, monkeypatch, values, block, indent, ascii_only
):
    monkeypatch.setattr(decode, "BLOCK", block)
    written = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    found = read(write(tmp_path, "a.json", written))
    assert [r.value for r in found] == values
    rows = written.split("\n")
    for record in found:
        assert rows[record.line - 1][max(0, record.column - 1) :].lstrip("[ ").startswith("{")


@pytest.mark.parametrize("cut", range(1, 60))
def test_an_array_that_is_cut_off_is_an_error(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(decode, "BLOCK", 7)
    whole = '[{"a": "some words", "b": [1, 2.5e3]},\n{"c": {"d": true}}]'
    if cut >= len(whole):
        assert len(read(write(tmp_path, "a.json", whole))) == 2
        return
    with pytest.raises(UserError):
        read(write(tmp_path, "a.json", whole[:cut]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(STRINGS, STRINGS), min_size=1, max_size=6))
def test_csv_is_read_as_it_was_written(tmp_path, rows):
    kept = [row for row in rows if not any("\r" in cell or "\0" in cell for cell in row)]
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([("a", "b"), *kept])
    found = read(write(tmp_path, "a.csv", sink.getvalue()))
    assert [(r.value["a"], r.value["b"]) for r in found] == kept
    begins, expected = 2, []
    for a, b in kept:
        expected.append(begins)
        begins += 1 + a.count("\n") + b.count("\n")
    assert [r.line for r in found] == expected


def test_a_long_cell_and_a_long_record(tmp_path):
    long = "word " * 100_000
    assert read(write(tmp_path, "a.csv", f"a,b\n1,{long}\n"))[0].value["b"] == long
    values: list[dict[str, Any]] = [{"a": long * 4}, {"a": 1}]
    assert [r.value for r in read(write(tmp_path, "a.json", json.dumps(values)))] == values


def test_memory_does_not_grow_with_an_array(tmp_path):
    peaks = []
    for count in (2_000, 8_000):
        path = write(tmp_path, "a.json", json.dumps([{"a": "some words " * 90}] * count))
        tracemalloc.start()
        assert sum(1 for _ in records([path], Account())) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000
