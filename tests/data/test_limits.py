"""The size of one document or record has a limit, and what has no end is not read."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmctl.data import decode, strict_json
from llmctl.data.document import Account, Limit
from llmctl.data.records import records
from llmctl.errors import UserError
from tests.data.test_records import read, write

LONG = "x" * 3000
TOO_LARGE = {
    "a.jsonl": ('{"a": 1}\n{"a": "' + LONG + '"}\n', "{p}:2: the line is larger than 0.002 MB"),
    "a.json": ('[{"a": 1},\n{"a": "' + LONG + '"}]', "{p}:2: the record is larger than 0.002 MB"),
    "cell.csv": ('a,b\n1,"' + "x\ny" * 1000 + '"\n', "{p}:2: the row is larger than 0.002 MB"),
    "a.csv": (f"a,b\n1,2\n1,{LONG}\n", "{p}:3: the line is larger than 0.002 MB"),
    "a.txt": (LONG, "{p}: the text, which is one record here, is larger than 0.002 MB"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_record_has_a_limit(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(decode, "BLOCK", 500)
    data, message = TOO_LARGE[name]
    path = write(tmp_path, name + (".gz" if pack is gzip.compress else ""), pack(data.encode()))
    limit = Limit(0.002, "eval.max_document_mb")
    with pytest.raises(UserError) as caught:
        list(records([path], Account(), limit))
    assert caught.value.message == message.replace("{p}", str(path))
    assert caught.value.hint == (
        "cut it into smaller documents, or raise eval.max_document_mb; memory grows by up to 6 times that"
    )
    assert list(records([path], Account(), Limit(1)))


def test_a_row_of_parquet_has_a_limit(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"a": ["x"] * 2000 + ["".join(map(chr, range(33, 126))) * 60] + ["x"] * 2000}), path
    )
    with pytest.raises(UserError) as caught:
        list(records([path], Account(), Limit(0.002)))
    assert caught.value.message == f"{path}: row 2001: the row is larger than 0.002 MB (0 MB)"
    assert len(list(records([path], Account(), Limit(1)))) == 4001


@pytest.mark.parametrize(("name", "ends"), [("a.jsonl", "{}\n"), ("a.json", "[{}]")])
def test_a_record_of_many_values(tmp_path, monkeypatch, name, ends):
    monkeypatch.setattr(strict_json, "MOST_VALUES", 100)
    begin, end = ends.split("{}")
    path = write(tmp_path, name, f'{begin}{{"a": [{"[]," * 120}[]]}}{end}')
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.message == f"{path}:1: the record holds more than 100 values"
    assert caught.value.hint == "cut it into several records, or leave out what is not needed"
    path = write(tmp_path, name, begin + json.dumps({"a": '[{,\\"' * 200}) + end)
    assert len(read(path)) == 1  # marks inside a string are no values


def test_a_pipe_and_a_device_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    os.symlink("/dev/zero", tmp_path / "b.jsonl")
    os.symlink("nowhere", tmp_path / "c.jsonl")
    said = []
    for name in "abc":
        with pytest.raises(UserError) as caught:
            read(tmp_path / f"{name}.jsonl")
        said.append(caught.value.message.removeprefix(f"{tmp_path}/"))
    assert said == [
        "a.jsonl: not a regular file, but a pipe",
        "b.jsonl: not a regular file, but a device",
        "c.jsonl: a link to nowhere, which is not there",
    ]
