"""The reader of small files: whatever lies there, an answer or a reason, and never a wait."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl import reading
from llmctl.reading import Unreadable, parse_json, read_bytes, read_rows, read_value


def looped(path: Path) -> None:
    path.symlink_to(path.name)


# what lies there -> the reason
ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a folder": (Path.mkdir, "not a regular file"),
    "a loop of links": (looped, "Too many levels of symbolic links"),
    "nested deep": (lambda path: path.write_text("[" * 5000 + "]" * 5000), "nested too deeply"),
    "nested less deep": (lambda path: path.write_text("[" * 101 + "]" * 101), "nested too deeply"),
    "a long number": (
        lambda path: path.write_text('{"step": ' + "9" * 5000 + "}"),
        "a whole number of 5,000 digits, more than 64 bits hold",
    ),
    "beyond 64 bits": (
        lambda path: path.write_text(str(2**64)),
        "a whole number of 20 digits, more than 64 bits hold",
    ),
    "no UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "not UTF-8 (byte 7)"),
    "no JSON": (lambda path: path.write_text("{"), "not valid JSON (Expecting property name"),
    "nothing": (lambda path: path.touch(), "not valid JSON (Expecting value"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_read(what: str, tmp_path: Path) -> None:
    make, reason = ODD[what]
    make(tmp_path / "x")
    with pytest.raises(Unreadable) as caught:
        read_value(tmp_path / "x")
    assert str(caught.value).startswith(reason)


def test_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for value in ([[[1]]], {"a": 2**64 - 1, "b": -(2**63), "c": 1e300}, [[]] * 500):
        path.write_text(json.dumps(value))
        assert read_value(path) == value
    path.write_text("\ufeff{}")
    assert read_value(path) == {}
    with pytest.raises(FileNotFoundError):
        read_value(tmp_path / "nowhere")
    assert parse_json(str(10**30), wide=True) == 10**30


def test_a_file_is_not_read_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * (2 << 20))
    with pytest.raises(Unreadable, match="larger than 1 MiB"):
        read_bytes(path, 1 << 20)
    assert len(read_bytes(path, 2 << 20)) == 2 << 20
    monkeypatch.setattr(reading, "LINE_LIMIT", 1 << 20)
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "' + b"y" * (3 << 20) + b'"}\n{"step": 3}\n')
    found = read_rows(path)
    assert [row["step"] for row in found.rows] == [1, 3]
    assert found.damaged == [(2, "a line of more than 1 MiB")]


def test_rows_that_are_damaged_hide_no_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "loss": 2.5}', b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b'{"step": -1}',
        b'{"step": true}', b'{"step": 2, "loss": "low"}', b'{"step": 2, "loss": NaN}', b"[" * 5000, b'{"step": 3, "lo',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    found = read_rows(path, numbers=True)
    assert [row["step"] for row in found.rows] == [1, 2]
    assert [number for number, _ in found.damaged] == [2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert dict(found.damaged)[8] == "loss is not a number" and dict(found.damaged)[4] == "no step"
    assert not found.whole
    assert read_rows(tmp_path / "nowhere").rows == []
