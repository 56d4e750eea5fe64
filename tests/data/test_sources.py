"""From what is named to files: folders, globs, builtins, and names that lead to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.data import builtin, sources
from llmctl.data.hub import dataset_files
from llmctl.data.readers import Account, documents, resolve
from llmctl.errors import UserError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch) -> Path:
    for name in (
        "b.txt",
        "a.jsonl",
        "sub/c.md.gz",
        "sub/deep/d.parquet",
        "notes.doc",
        ".hidden.txt",
        ".git/e.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f.doc").write_bytes(b"x")
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
        ([], "no data is named", "with --data"),
        (["zebra.md"], "zebra.md: no such file or folder", "check the path"),
        (["c.txt"], "c.txt: no such file or folder", "did you mean `b.txt`?"),
        (["nowhere/a.txt"], "nowhere/a.txt: no such file or folder", "check the path"),
        (["bare"], "bare: the folder holds no data files", "known are `.txt`"),
        (["other"], "other: the folder holds no data files", "known are `.txt`"),
        (["*.parquet"], "*.parquet: no file matches", "** crosses folders"),
        (["*.doc"], "notes.doc: cannot tell how to read `.doc` files", "known are `.txt`"),
        (
            ["builtin:pydocs"],
            "builtin:pydocs: no such builtin data; there is `builtin:pydoc`",
            "`builtin:pydoc`?",
        ),
        (
            ["builtin:tinyworld-preferences"],
            "builtin:tinyworld-preferences: holds records, not text",
            "text is in `builtin:pydoc`, `builtin:tinyworld`",
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


def test_builtins_of_records_are_found_where_records_are_wanted(tree):
    named = [f"builtin:{name}" for name in (*builtin.BUILTIN_RECORDS, *builtin.BUILTIN)]
    assert resolve(named, "records") == named
    with pytest.raises(UserError) as caught:
        resolve(["builtin:tinyworld-preference"], "records")
    assert caught.value.hint == "did you mean `builtin:tinyworld-preferences`?"
    with pytest.raises(UserError, match="holds records, not text"):
        sources.resolve(["builtin:tinyworld-instructions"])


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


# --- data sets on the hub ---------------------------------------------------------------------------


class Hub:
    """Stands for the hub: one data set, whose files lie in `folder`, or an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.asked: list[tuple[str, str, list[str]]] = []

    def dataset_info(self, name: str, timeout: float) -> None:
        if self.error is not None:
            raise self.error

    def snapshot_download(self, name, repo_type, allow_patterns, local_files_only):
        self.asked.append((name, repo_type, allow_patterns))
        if local_files_only and not self.folder.is_dir():
            raise OSError("nothing in the cache")
        return str(self.folder)

    def put(self, *names: str) -> None:
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text("x")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "cache" / "snapshot")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    dataset_files.cache_clear()
    return hub


def test_a_data_set_on_the_hub_is_its_data_files(hub):
    data = ["data/train-0.parquet", "data/train-1.parquet", "more.jsonl.gz"]
    hub.put(*data, "README.md", "dataset_infos.json", "load.py", ".huggingface/x.json", "logo.png")
    assert resolve(["someone/some-data"]) == [hub.folder / name for name in data]
    assert resolve(["someone/some-data:data/*"]) == [hub.folder / name for name in data[:2]]
    (name, repo_type, patterns), (_, _, chosen) = hub.asked
    assert (name, repo_type, chosen) == ("someone/some-data", "dataset", ["data/*"])
    assert {"*.parquet", "*.jsonl.gz"} <= set(patterns)
    assert not {"*.md", "*.py"} & set(patterns)
    resolve(["someone/some-data"])
    assert len(hub.asked) == 2, "the hub is asked once a run"


def test_a_cached_data_set_needs_no_network(hub):
    hub.put("train.json")
    hub.error = OSError("no network")
    assert resolve(["someone/some-data"]) == [hub.folder / "train.json"]


@pytest.mark.parametrize(
    ("files", "named", "message", "hint"),
    [
        (
            ["a/train.json", "a/test.json"],
            "x/y",
            "x/y: has the splits `test`, `train`",
            "choose files of it by a pattern, as in 'x/y:*train*'",
        ),
        (["notes.md"], "x/y", "x/y: no data files in it", "look at its page on the hub"),
        (["a.json"], "x/y:*train*", "x/y:*train*: no data files in it", "known are `.json`"),
        (["a.json"], "cache/y", "cache/y: no such file or folder", "check the path"),
        (["a.json"], "x/a.jsonl", "x/a.jsonl: no such file or folder", "check the path"),
        (["a.json"], "x/y/z", "x/y/z: no such file or folder", "check the path"),
    ],
)
def test_what_is_not_found_in_a_data_set(hub, files, named, message, hint):
    hub.put(*files)
    with pytest.raises(UserError) as caught:
        resolve([named])
    assert caught.value.message == message
    assert hint in (caught.value.hint or "")


def hub_error(name: str) -> Exception:
    import httpx2
    from huggingface_hub import errors

    if name == "ConnectError":
        return httpx2.ConnectError("name or service not known")
    if name == "HFValidationError":
        return errors.HFValidationError("refused")
    answer = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid/api"))
    return getattr(errors, name)("refused", response=answer)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            "ConnectError",
            "x/y: not a file or folder here, and the hub cannot be reached",
            "check the spelling and the network, or name a file or folder",
        ),
        (
            "RepositoryNotFoundError",
            "x/y: neither a file or folder here nor a dataset on the hub",
            "check the spelling; a private dataset needs `hf auth login`",
        ),
        (
            "GatedRepoError",
            "x/y: the hub gives it only to those who accepted its terms",
            "accept them on its page, then log in with `hf auth login`",
        ),
        (
            "HFValidationError",
            "x/y: no such file or folder",
            "name a file or folder, or a data set on the hub",
        ),
    ],
)
def test_what_the_hub_says_of_data(hub, error, message, hint):
    hub.error = hub_error(error)
    with pytest.raises(UserError) as caught:
        resolve(["x/y"])
    assert (caught.value.message, caught.value.hint) == (message, hint)
