"""From what is named to files: folders, globs, builtins, and names that lead to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.data import builtin, sources
from llmctl.data.readers import Account, documents, resolve
from llmctl.errors import UserError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch) -> Path:
    for name in (
        "b.txt",
        "a.jsonl",
        "sub/c.md.gz",
        "sub/deep/d.parquet",
        "notes.csv",
        ".hidden.txt",
        ".git/e.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f.csv").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (["b.txt", "a.jsonl"], ["b.txt", "a.jsonl"]),
        (["."], ["a.jsonl", "b.txt", "sub/c.md.gz", "sub/deep/d.parquet"]),
        (["sub"], ["sub/c.md.gz", "sub/deep/d.parquet"]),
        (["*"], ["a.jsonl", "b.txt"]),
        (["**/*.gz", "a*"], ["sub/c.md.gz", "a.jsonl"]),
        (["builtin:pydoc", "b.txt", "builtin:tinyworld"], ["builtin:pydoc", "b.txt", "builtin:tinyworld"]),
    ],
)
def test_resolve(tree, named, found):
    assert [str(item) for item in resolve(named)] == found


@pytest.mark.parametrize(
    ("named", "message", "hint"),
    [
        ([], "no data is named", "with --data (data.train)"),
        (["zebra.md"], "zebra.md: no such file or folder", "check the path"),
        (["c.txt"], "c.txt: no such file or folder", "did you mean `b.txt`?"),
        (["nowhere/a.txt"], "nowhere/a.txt: no such file or folder", "check the path"),
        (["bare"], "bare: the folder holds no data files", "known are `.txt`"),
        (["other"], "other: the folder holds no data files", "known are `.txt`"),
        (["*.parquet"], "*.parquet: no file matches", "** crosses folders"),
        (["*.csv"], "notes.csv: cannot tell how to read `.csv` files", "known are `.txt`"),
        (
            ["builtin:pydocs"],
            "builtin:pydocs: no such builtin data; there is `builtin:pydoc`",
            "`builtin:pydoc`?",
        ),
        (["builtin:x"], "builtin:x: no such builtin data; there is `builtin:pydoc`", "pick one of these"),
        (["b.txt", "b.txt"], "b.txt: named twice", "num_train_epochs"),
        (["b.txt", "./*.txt"], "b.txt: named by b.txt and by ./*.txt", "num_train_epochs"),
        (["builtin:pydoc"] * 2, "builtin:pydoc: named twice", "num_train_epochs"),
    ],
)
def test_resolve_refuses(tree, named, message, hint):
    with pytest.raises(UserError) as caught:
        resolve(named)
    assert caught.value.message.startswith(message)
    assert hint in (caught.value.hint or "")


def test_a_folder_that_cannot_be_listed_is_an_error(tree, monkeypatch):
    def walk(path, onerror):
        onerror(PermissionError(13, "Permission denied", "sub"))

    monkeypatch.setattr("llmctl.data.sources.os.walk", walk)
    with pytest.raises(UserError, match="sub: no permission to read"):
        resolve(["."])


@pytest.mark.parametrize("name", list(builtin.BUILTIN))
def test_builtins_are_the_same_each_time(name):
    def first(count: int) -> list[str]:
        found = documents([f"builtin:{name}"], "text", Account())
        return [next(found).text for _ in range(count)]

    assert first(200) == first(200)
    assert len(set(first(200))) > 100
    assert builtin.BUILTIN[name].fingerprint() == builtin.BUILTIN[name].fingerprint()


def test_pydoc_holds_reference_and_sources_but_no_tests():
    account = Account()
    found = list(documents(["builtin:pydoc"], "text", account))
    texts = [document.text for document in found]
    assert any('The "assert" statement' in text for text in texts)
    assert any("def dataclass(" in text for text in texts)
    assert not {"test", "tests", "site-packages"} & {file.parent.name for file in builtin._library_files()}
    assert [d.line for d in found] == sorted({d.line for d in found})
    assert sum(map(len, texts)) > 5_000_000


def test_a_library_file_that_cannot_be_read_is_counted(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    (tmp_path / "b.py").write_bytes(b"# \xff\n")
    monkeypatch.setattr(builtin, "_library_files", lambda: [tmp_path / "a.py", tmp_path / "b.py"])
    account = Account()
    assert [d.text for d in documents(["builtin:pydoc"], "text", account)][-1] == "x = 1\n"
    assert account.dropped == {"a source file that cannot be read": [str(tmp_path / "b.py")]}


def test_total_bytes_counts_files_and_not_builtins(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 10)
    (tmp_path / "b.jsonl").write_bytes(b"y" * 7)
    assert sources.total_bytes([tmp_path]) == 17
    assert sources.total_bytes([tmp_path, "builtin:tinyworld"]) is None
