"""Token shards: the ids on disk are the ids of the text, an entry is whole or it is not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmctl import cuts
from llmctl.data import decode, shards
from llmctl.data.shards import Encoder, Shards, open_shards
from llmctl.errors import UserError
from llmctl.talk import SILENT

TEXTS = ["first", "zwei Straßen", "三条街", "last one"]
BOS, EOS = 256, 257


def encode(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def refuse(texts: list[str]) -> list[list[int]]:
    raise AssertionError("encoded again")


BYTES = Encoder(encode, BOS, EOS, 258, "bytes")
NEVER = replace(BYTES, encode_batch=refuse)


class Said:
    """A Talk that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bars: list[tuple[str, float | None, str]] = []
        self.done = 0.0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def bar(self, label: str, total: float | None, unit: str):
        self.bars.append((label, total, unit))
        self.done = 0.0
        return nullcontext(self)

    def advance(self, amount: float = 1, **facts: str) -> None:
        self.done += amount


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def texts_of(found: Shards) -> list[str]:
    """The documents again, from the ids, without BOS and EOS."""
    cuts = zip(found.doc_start[:-1], found.doc_start[1:], strict=True)
    return [bytes(found.ids[a + 1 : b - 1].astype(np.uint8)).decode() for a, b in cuts]


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "shards").iterdir() if not p.name.startswith(".lock"))


def test_round_trip(data, cache):
    talk = Said()
    found = open_shards([data], "text", BYTES, cache, talk)
    assert texts_of(found) == TEXTS
    assert found.ids.dtype == np.uint16
    assert {a.dtype for a in (found.doc_start, found.doc_bytes, found.doc_origin)} == {np.dtype("int64")}
    assert found.ids[found.doc_start[:-1]].tolist() == [BOS] * 4
    assert found.ids[found.doc_start[1:] - 1].tolist() == [EOS] * 4
    assert found.doc_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.where(2) == f"{data}:5"
    assert found.account.lines() == ["read 4 documents, kept 4"]
    assert found.path == cache / "shards" / found.fingerprint
    size = data.stat().st_size / 1e6
    assert talk.bars == [("checking data", size, "MB"), ("tokenizing", size, "MB")]
    assert talk.done == pytest.approx(size)
    assert talk.lines == [f"wrote {len(found.ids)} tokens of 4 documents to {found.path}"]


def test_without_bos_and_eos_and_with_a_wide_vocabulary(data, cache):
    wide = Encoder(lambda texts: [[65536, *ids] for ids in encode(texts)], None, None, 65537, "wide")
    found = open_shards([data], "text", wide, cache, SILENT)
    assert found.ids.dtype == np.uint32
    assert found.ids[found.doc_start[:-1]].tolist() == [65536] * 4
    last = replace(wide, encode_batch=lambda texts: [[65535] for _ in texts], vocab_size=65536)
    found = open_shards([data], "text", last, cache, SILENT)
    assert found.ids.dtype == np.uint16
    assert found.ids.tolist() == [65535] * 4


def test_a_long_text_is_one_document(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 50)
    monkeypatch.setattr(cuts, "PART", 100)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 250)
    text = "some words and söme more\n" * 100
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    found = open_shards([tmp_path / "a.txt", tmp_path / "b.txt"], "text", BYTES, cache, SILENT)
    assert texts_of(found) == [text, "short"]
    assert found.doc_bytes.tolist() == [len(text.encode()), 5]
    assert [found.where(0), found.where(1)] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_an_entry_is_reused_even_if_the_file_moved(data, cache, tmp_path):
    made = open_shards([data], "text", BYTES, cache, SILENT)
    moved = data.rename(tmp_path / "moved.jsonl")
    talk = Said()
    again = open_shards([moved], "text", NEVER, cache, talk)
    assert talk.lines == [f"reusing {len(made.ids)} tokens of 4 documents from {made.path}"]
    assert np.array_equal(again.ids, made.ids)
    assert again.account == made.account
    assert again.where(0) == f"{moved}:1"


@pytest.mark.parametrize("change", ["content", "tokenizer", "eos", "field", "extension", "order"])
def test_whatever_changes_the_ids_changes_the_key(data, cache, tmp_path, change):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x", "body": "y"}')
    sources, field, encoder = [data, other], "text", BYTES
    before = open_shards(sources, field, encoder, cache, SILENT).fingerprint
    if change == "content":
        other.write_text('{"text": "y"}')
    elif change == "tokenizer":
        encoder = replace(BYTES, fingerprint="others")
    elif change == "eos":
        encoder = replace(BYTES, eos_id=None)
    elif change == "field":
        data.write_text('{"text": "x", "body": "y"}\n')
        before = open_shards(sources, "text", encoder, cache, SILENT).fingerprint
        field = "body"
    elif change == "extension":
        sources = [data, other.rename(tmp_path / "other.txt")]
    else:
        sources = [other, data]
    assert open_shards(sources, field, encoder, cache, SILENT).fingerprint != before


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("ids.bin", cut_off, "is damaged (ids.bin has"),
        ("ids.bin", flip, "is damaged (the checksum of ids.bin is wrong)"),
        ("doc_start.bin", cut_off, "is damaged (doc_start.bin has"),
        ("doc_origin.bin", flip, "is damaged (the checksum of doc_origin.bin is wrong)"),
        ("doc_bytes.bin", Path.unlink, "is incomplete"),
        ("meta.json", cut_off, ""),
        ("meta.json", lambda path: path.write_text("[]"), "is damaged"),
        ("meta.json", lambda path: path.write_text('{"columns": {}}'), "is damaged"),
        ("meta.json", lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        ("meta.json", Path.unlink, "is incomplete"),
    ],
)
def test_a_damaged_entry_is_made_again(data, cache, name, damage, said):
    made = open_shards([data], "text", BYTES, cache, SILENT)
    damage(made.path / name)
    talk = Said()
    again = open_shards([data], "text", BYTES, cache, talk)
    assert texts_of(again) == TEXTS
    assert said in talk.lines[0]
    assert texts_of(open_shards([data], "text", NEVER, cache, SILENT)) == TEXTS
    assert entries(cache) == [made.fingerprint]


def bad_text(data: Path) -> None:
    with open(data, "a") as file:
        file.write("{\n")


@pytest.mark.parametrize("fail", ["input", "interrupt", "disk"])
def test_nothing_is_left_of_a_failed_build(data, cache, monkeypatch, fail):
    def interrupt(texts: list[str]) -> list[list[int]]:
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    encoder, expected = BYTES, UserError
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 1)
    if fail == "input":
        bad_text(data)
    elif fail == "interrupt":
        encoder, expected = replace(BYTES, encode_batch=interrupt), KeyboardInterrupt
    else:
        monkeypatch.setattr(shards._Column, "append", full)
    with pytest.raises(expected) as caught:
        open_shards([data], "text", encoder, cache, SILENT)
    assert entries(cache) == []
    if fail == "disk":
        assert caught.value.message.endswith(": the disk is full")
    if fail == "input":
        assert f"{data}:9: invalid JSON" in caught.value.message


def test_errors_about_data_and_cache(data, cache, tmp_path):
    nothing = Encoder(lambda texts: [[] for _ in texts], None, None, 10, "nothing")
    with pytest.raises(UserError, match="the texts give no tokens at all"):
        open_shards([data], "text", nothing, cache, SILENT)

    def grow(texts: list[str]) -> list[list[int]]:
        data.write_text(data.read_text() + '{"text": "more"}\n')
        return encode(texts)

    with pytest.raises(UserError) as caught:
        open_shards([data], "text", replace(BYTES, encode_batch=grow), cache, SILENT)
    assert caught.value.message == f"{data}: changed while it was read"
    assert caught.value.hint == "run again when nothing writes to it"
    assert entries(cache) == []

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        open_shards([data], "text", BYTES, tmp_path / "file", SILENT)
    assert caught.value.message == f"{tmp_path / 'file' / 'shards'}: cannot be a folder, a file is in its way"
    assert caught.value.hint == "set data.cache_dir (for eval: eval.cache_dir) to a folder you can write"


@pytest.mark.parametrize("act", ["mkdir", "read"])
def test_a_cache_without_permission(data, cache, monkeypatch, act):
    def refuse_all(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    if act == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse_all)
    else:
        monkeypatch.setattr(shards, "read_bounded", refuse_all)
        (cache / "shards").mkdir(parents=True)
        monkeypatch.setattr(Path, "is_file", lambda path: True)
    with pytest.raises(UserError) as caught:
        open_shards([data], "text", BYTES, cache, SILENT)
    assert caught.value.message.startswith(str(cache / "shards"))
    assert caught.value.message.endswith(": no permission to write")
    assert caught.value.hint == "set data.cache_dir (for eval: eval.cache_dir) to a folder you can write"


def test_ids_beyond_the_vocabulary_are_a_bug(data, cache):
    with pytest.raises(ValueError, match="from a tokenizer of 100 entries"):
        open_shards([data], "text", replace(BYTES, vocab_size=100), cache, SILENT)


# One document a batch, so that a build has many moments to be cut short in.
OTHER_PROCESS = textwrap.dedent("""
    import os, signal, sys, time
    from llmctl.data import shards
    from llmctl.talk import SILENT

    data, cache, act = sys.argv[1:]
    shards.BATCH_DOCUMENTS = 1
    calls = 0

    class Talk:
        bar = SILENT.bar
        def say(self, text):
            print(text, flush=True)

    def encode(texts):
        global calls
        calls += 1
        if act == "die" and calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "dawdle":
            time.sleep(0.2)
        return [list(text.encode()) for text in texts]

    found = shards.open_shards([data], "text", shards.Encoder(encode, 256, 257, 258, "bytes"), cache, Talk())
    print(found.ids.sum(), calls)
""")


def other_process(data: Path, cache: Path, act: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, data, cache, act], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_build_leaves_nothing_that_looks_complete(data, cache):
    killed = other_process(data, cache, "die")
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    (left,) = entries(cache)
    assert left.startswith(".tmp-")
    found = open_shards([data], "text", BYTES, cache, SILENT)
    assert texts_of(found) == TEXTS
    assert entries(cache) == [found.fingerprint]


def test_two_processes_build_one_entry(data, cache):
    both = [other_process(data, cache, "dawdle") for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    sums, calls = zip(*(text.split("\n")[-2].split() for text in said), strict=True)
    assert sums[0] == sums[1]
    assert sorted(calls) == ["0", "4"]
    assert any("another process is preparing the same data" in text for text in said) or any(
        "reusing" in text for text in said
    )
    assert texts_of(open_shards([data], "text", NEVER, cache, SILENT)) == TEXTS


def test_the_arrays_are_memory_mapped_and_read_only(data, cache):
    found = open_shards([data], "text", BYTES, cache, SILENT)
    assert isinstance(found.ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.ids[0] = 1
    assert os.path.getsize(found.path / "ids.bin") == 2 * len(found.ids)
