"""Reading: what goes in comes out once, and what is wrong is said with its place."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llmctl import cuts
from llmctl.data import decode, sources
from llmctl.data.readers import Account, Document, documents
from llmctl.errors import UserError

SOME = ["One day.\nAnother day.\n", "Zwei Straßen, 三条街\r\n", "  leading, trailing  "]


def read(*names: object, field: str = "text") -> tuple[list[Document], Account]:
    account = Account()
    found = list(documents([str(name) for name in names], field, account))
    assert account.read == account.kept + sum(account.counts.values())
    return found, account


def error(*names: object, field: str = "text") -> UserError:
    with pytest.raises(UserError) as caught:
        read(*names, field=field)
    raised = caught.value
    assert raised.hint and "\n" not in raised.message + raised.hint
    assert raised.message[-1] != "."
    return raised


def parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


LINES = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(SOME)).encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", SOME[1].encode(), [(SOME[1], None)]),
        ("a.md", b"\xef\xbb\xbf# T\n", [("# T\n", None)]),
        ("a.py", b"x = 1\n", [("x = 1\n", None)]),
        ("a.rst", b"T\n=\n", [("T\n=\n", None)]),
        ("a.jsonl", LINES, [(text, n) for n, text in enumerate(SOME, 1)]),
        ("b.jsonl", b"\xef\xbb\xbf" + LINES.rstrip(b"\n"), [(text, n) for n, text in enumerate(SOME, 1)]),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}]', [("a", 1), ("b", 2)]),
        ("a.csv", b'id,text\n1,"a\nb"\n2,c\n', [("a\nb", 2), ("c", 4)]),
        ("c.jsonl", b'\n{"text": "a"}\n \r\n{"text": "b"}\r\n\n', [("a", 2), ("b", 4)]),
    ],
)
def test_reads_every_format_packed_or_not(tmp_path, name, data, expected, pack):
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[pack]
    path = tmp_path / (name + suffix)
    path.write_bytes(pack(data))
    found, account = read(path)
    assert [(d.text, d.line) for d in found] == expected
    assert all(d.source == str(path) and d.starts and d.ends for d in found)
    assert account.kept == len(expected)
    assert account.input_bytes == path.stat().st_size


def test_reads_parquet_across_row_groups_and_string_kinds(tmp_path):
    texts = [f"text {n}" for n in range(1000)]
    kinds = {
        "plain": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "words": pa.array(texts).dictionary_encode(),
    }
    path = parquet(tmp_path / "a.parquet", kinds, row_group_size=300)
    for field in kinds:
        found, account = read(path, field=field)
        assert [d.text for d in found] == texts
        assert [d.line for d in found] == list(range(1, 1001))
        assert account.input_bytes == pytest.approx(path.stat().st_size, abs=2)
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [d.text for d in read(packed, field="plain")[0]] == texts


def test_gz_of_several_members_is_read_whole(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert [d.text for d in read(path)[0]] == ["one two"]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd(b"one ") + zstd(b"two"))
    assert [d.text for d in read(path)[0]] == ["one two"]


def test_dropped_documents_are_counted_with_reason_and_place(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["good", " \n\t", None, "half \ud800", "", "good"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found, account = read(path)
    assert [d.line for d in found] == [1, 6]
    assert account.lines() == [
        "read 6 documents, kept 2",
        f"dropped 1: half a surrogate pair, which is not text ({path}:4)",
        f"dropped 2: no text in it ({path}:2, {path}:5)",
        f"dropped 1: the text is null ({path}:3)",
    ]
    assert Account(**account.to_json()) == account


def test_account_lists_only_the_first_places():
    account = Account()
    for n in range(9):
        account.drop("no text in it", f"a:{n}")
    assert account.lines()[1] == "dropped 9: no text in it (a:0, a:1, a:2, a:3, a:4, …)"


def test_an_empty_file_in_a_folder_is_dropped_not_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    found, account = read(tmp_path)
    assert len(found) == 1
    assert account.counts == {"no text in it": 1}


DEEP = b"[" * 100_000
BAD = [
    (
        "a.jsonl",
        LINES + b'{"text": \n',
        "{p}:4: invalid JSON (expecting value, column 10)",
        "one JSON object a line",
    ),
    (
        "a.jsonl",
        b'{"text": "a"} {}\n',
        "{p}:1: invalid JSON (extra data, column 15)",
        "one JSON object a line",
    ),
    (
        "a.jsonl",
        b'{"text": "a',
        "{p}:1: invalid JSON (unterminated string starting at, column 10)",
        "one JSON",
    ),
    ("a.jsonl", DEEP, "{p}:1: invalid JSON (", "one JSON object a line"),
    ("a.jsonl", b'["text"]\n', "{p}:1: the line holds a list, not an object", '{"text": "…"}'),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', "{p}:2: the line holds a string, not an object", '{"text": "…"}'),
    (
        "a.jsonl",
        b'{"txt": "a", "id": 1}',
        "{p}:1: no field `text`; there is `txt`, `id`",
        "data.text_field=txt",
    ),
    ("a.jsonl", b"{}\n", "{p}:1: no field `text`; there is nothing", "data.text_field=NAME"),
    ("a.jsonl", b'{"text": 7}', "{p}:1: `text` is a number, not text", "data.text_field=NAME"),
    ("a.jsonl", b'{"text": ["a"]}', "{p}:1: `text` is a list, not text", "data.text_field=NAME"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "{p}: not UTF-8 at byte offset 24 in the file", "iconv"),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "\xff"}', "{p}: not UTF-8 at byte offset 13 in the file", "iconv"),
    ("a.txt", b"abc\xe9\n", "{p}: not UTF-8 at byte offset 3 in the file", "iconv"),
    ("a.txt", b"\xef\xbb\xbfabc\xe9\n", "{p}: not UTF-8 at byte offset 6 in the file", "iconv"),
    ("a.txt", b"abc\xe4\xb8", "{p}: not UTF-8 at byte offset 3 in the file", "iconv"),
    ("a.txt", b"x" * 300_000 + b"\xff", "{p}: not UTF-8 at byte offset 300000 in the file", "iconv"),
    ("a.txt.gz", gzip.compress(b"ab\xff"), "{p}: not UTF-8 at byte offset 2 in the unpacked file", "iconv"),
    (
        "a.txt",
        "text".encode("utf-16"),
        "{p}: the file is UTF-16, not UTF-8",
        "iconv -f UTF-16 -t UTF-8 a.txt",
    ),
    ("a.jsonl", "{}".encode("utf-16"), "{p}: the file is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    ("a.txt", b"\xfe\xff\0a", "{p}: the file is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    ("a.txt", "text".encode("utf-32"), "{p}: the file is UTF-32, not UTF-8", "iconv -f UTF-32 -t UTF-8"),
    ("a.txt", b"", "{p}: the file is empty", "leave it out"),
    (
        "a.txt",
        b" \n \n",
        "{p}: no usable text (read 1 document, kept 0; dropped 1: no text in it ({p}))",
        "check",
    ),
    ("a.jsonl", b"\n\n", "{p}: no usable text (read 0 documents, kept 0)", "check the files"),
    ("a.txt.gz", b"plain", "{p}: not a gzip file, or a damaged one", "gzip -t"),
    ("a.txt.gz", gzip.compress(os.urandom(999))[:500], "{p}: the compressed file is truncated", "again"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-3], "{p}: the compressed file is truncated", "again"),
    (
        "a.txt.gz",
        gzip.compress(bytes(999))[:15] + b"\xff" * 30,
        "{p}: not a gzip file, or a damaged one",
        "gzip -t",
    ),
    ("a.txt.zst", b"plain", "{p}: not a zstd file, or a damaged or truncated one", "zstd -t"),
    (
        "a.txt.zst",
        zstd(os.urandom(999))[:500],
        "{p}: not a zstd file, or a damaged or truncated one",
        "zstd -t",
    ),
    ("a.parquet", b"plain", "{p}: not a parquet file, or a damaged one (", "again"),
    ("a.parquet.gz", gzip.compress(b"plain"), "{p}: not a parquet file, or a damaged one (", "again"),
    ("a.parquet.gz", b"plain", "{p}: not a gzip file, or a damaged one", "gzip -t"),
    ("a.doc", b"text\n", "{p}: cannot tell how to read `.doc` files", "known are `.txt`, `.md`"),
    ("a.json", b"[]", "{p}: no usable text (read 0 documents, kept 0)", "check the files"),
    ("a.json", b'[{"txt": "a"}]', "{p}:1: no field `text`; there is `txt`", "data.text_field=txt"),
    ("a.csv", b"id,body\n1,a\n", "{p}:2: no field `text`; there is `id`, `body`", "data.text_field=NAME"),
    ("a.jsonl", gzip.compress(LINES), "{p}: the file is gzip, which its name does not say", ".gz"),
    ("a.json", zstd(LINES), "{p}: the file is zstd, which its name does not say", ".zst"),
    ("a.txt", b"PAR1....PAR1", "{p}: the file is parquet, which its name does not say", ".parquet"),
    ("README", b"text", "{p}: cannot tell how to read `README` files", "`.txt`"),
]


@pytest.mark.parametrize(("name", "data", "message", "hint"), BAD)
def test_bad_file(tmp_path, name, data, message, hint):
    path = tmp_path / name
    path.write_bytes(data)
    raised = error(path)
    assert raised.message.startswith(message.replace("{p}", str(path)))
    assert hint in (raised.hint or "")


def test_bad_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    raised = error(path)
    assert raised.message == f"{path}: no field `text`; there is `body`, `id`"
    raised = error(path, field="id")
    assert raised.message == f"{path}: the column `id` is int64, not text"
    assert raised.hint == "say which field holds the text, as in data.text_field=NAME; there is `body`, `id`"

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert error(path, field="body").message.startswith(f"{path}: not a parquet file, or a damaged one (")

    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    path = parquet(tmp_path / "b.parquet", {"text": broken})
    assert error(path).message.startswith(f"{path}: row 1: text that is not UTF-8")

    path = parquet(tmp_path / "c.parquet", {"text": pa.array([None, "a", " "])})
    found, account = read(path)
    assert [d.line for d in found] == [2]
    assert account.dropped == {"the text is null": [f"{path}:1"], "no text in it": [f"{path}:3"]}


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "_CountedFile", refuse)
    raised = error(path)
    assert raised.message == f"{path}: no permission to read"
    assert raised.hint == "ask its owner, or copy it elsewhere"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_no_permission_for_real(tmp_path, name):
    path = tmp_path / name
    path.write_text("text")
    path.chmod(0)
    assert error(path).message == f"{path}: no permission to read"


# --- a long text in parts ---------------------------------------------------------------------------

# The regular expressions by which well-known byte-level tokenizers split text before merging.
SPLITS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPLITTERS = {name: pre_tokenizers.Split(Regex(regex), "isolated") for name, regex in SPLITS.items()}


BLANKS = ["\n", "\n\n", "\r\n", " ", "  ", "\t", "\x1c", "\u2028"]
WORDS = ["a", "Bc", "'s", "7", "123", "é", "e\u0301", "三", "条街", "🙂"]
ATOMS = [*BLANKS, *WORDS, ".", ",", "/", "_", "。", "，"]


def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(decode, "BLOCK", 7)
    monkeypatch.setattr(cuts, "PART", 12)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.sampled_from(ATOMS),
        min_size=10,
        max_size=80,
    ).map("".join)
)
def test_parts_join_to_the_text_and_split_like_it(tmp_path, monkeypatch, text):
    small_parts(monkeypatch)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    if not text.strip():
        return
    parts, account = read(path)
    assert "".join(part.text for part in parts) == text
    assert [part.starts for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (account.read, account.kept) == (1, 1)
    for splitter in SPLITTERS.values():
        apart = [piece for part in parts for piece, _ in splitter.pre_tokenize_str(part.text)]
        assert apart == [piece for piece, _ in splitter.pre_tokenize_str(text)]


def test_text_is_cut_in_parts_of_bounded_size(tmp_path, monkeypatch):
    small_parts(monkeypatch)
    monkeypatch.setattr(cuts, "LONGEST_PART", 50)
    path = tmp_path / "a.txt"
    for text, longest in (("word by word " * 40, 20), ("x" * 500, 60), ("三条街。" * 60, 20)):
        path.write_bytes(text.encode())
        parts, _ = read(path)
        assert "".join(part.text for part in parts) == text
        assert max(len(part.text) for part in parts) <= longest


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.json", "b.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    words = b"some words and more of them " * 30
    begin, line = {
        ".csv": (b"text\n", words + b"\n"),
        ".json": (b"[", b'{"text": "' + words + b'"},\n'),
    }.get(Path(name).suffix, (b"", b'{"text": "' + words + b'"}\n'))
    peaks = []
    for megabytes in (2, 8):
        data = begin + line * (megabytes * 1_000_000 // len(line))
        data = data[:-2] + b"]" if begin == b"[" else data
        path = tmp_path / name
        path.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(data))
        del data
        tracemalloc.start()
        account = Account()
        assert sum(len(d.text) for d in documents([path], "text", account)) > megabytes * 900_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000
