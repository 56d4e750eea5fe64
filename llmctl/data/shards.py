"""Token ids of a whole data set on disk, memory-mapped, made once and found again by content.

    CACHE/shards/KEY/  ids.bin         uint16 or uint32 [N]   [bos] + ids + [eos] of every document
                       doc_start.bin   int64 [D+1]            where each document begins in ids
                       doc_bytes.bin   int64 [D]              UTF-8 bytes of each document's text
                       doc_origin.bin  int64 [D, 2]           source number, line (0: a whole file)
                       meta.json       sizes and checksums of the above, and the account of reading

KEY is a hash of the bytes of every source, the tokenizer, the text field and this format. So a changed
file, or another tokenizer, gets an entry of its own, and a moved file is still known.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmctl.cuts import MayCut, anywhere_safe
from llmctl.data.builtin import BUILTIN
from llmctl.data.document import MEGABYTE, Account, Document, Limit
from llmctl.data.readers import documents
from llmctl.data.records import DEFAULT_LIMIT
from llmctl.data.sources import BUILTIN_PREFIX, file_format, reading, resolve, total_bytes
from llmctl.errors import UserError
from llmctl.files import CHUNK, disk_errors, file_hash, folder_atomic, read_bounded, write_json
from llmctl.talk import Bar, Talk

FORMAT = 1
META = "meta.json"
COLUMNS = ("ids", "doc_start", "doc_bytes", "doc_origin")
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 18  # a tokenizer takes 150 to 500 bytes for each while it works
ELSEWHERE = "set data.cache_dir (for eval: eval.cache_dir) to a folder you can write"


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, as far as shards need one.

    Args:
        encode_batch: texts -> ids of each, without special tokens.
        bos_id: put before every document; None for nothing.
        eos_id: put after every document; None for nothing.
        vocab_size: every id is below it, special and added tokens included.
        fingerprint: differs between tokenizers that would give other ids.
        may_cut: where it lets a text be cut, as in `cuts`.
        adds_space: it puts a space before every text, so a part that goes on after one leaves that to it.
    """

    encode_batch: Callable[[list[str]], list[list[int]]]
    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    fingerprint: str
    may_cut: MayCut = anywhere_safe
    adds_space: bool = False

    def encode(self, batch: list[Document]) -> list[list[int]]:
        """The ids of documents and of parts of documents."""
        return self.encode_batch([self._shown(document) for document in batch])

    def _shown(self, document: Document) -> str:
        goes_on = self.adds_space and not document.starts and document.text.startswith(" ")
        return document.text[1:] if goes_on else document.text


@dataclass(frozen=True)
class Shards:
    """An open data set. The arrays are memory-mapped and read-only.

    Args:
        ids: uint16 or uint32 [N].
        doc_start: int64 [D+1], offsets in `ids`; document d is ids[doc_start[d]:doc_start[d+1]].
        doc_bytes: int64 [D], UTF-8 bytes of the text of each document.
        doc_origin: int64 [D, 2], number in `sources` and line (0: the whole file).
        sources: names of the files and builtins, as they were named this time.
        fingerprint: the cache key; equal for equal content and tokenizer.
        account: what was read, kept and dropped when the entry was made.
        path: the folder of the entry.
    """

    ids: np.ndarray
    doc_start: np.ndarray
    doc_bytes: np.ndarray
    doc_origin: np.ndarray
    sources: list[str]
    fingerprint: str
    account: Account
    path: Path

    def where(self, document: int) -> str:
        """The place a document was read from, as "path:line"."""
        source, line = (int(number) for number in self.doc_origin[document])
        return f"{self.sources[source]}:{line}" if line else self.sources[source]


def open_shards(
    sources: Iterable[str | Path],
    text_field: str,
    encoder: Encoder,
    cache_dir: str | Path,
    talk: Talk,
    limit: Limit = DEFAULT_LIMIT,
) -> Shards:
    """The token ids of `sources`, from the cache or made now. One process makes an entry at a time.

    Raises:
        UserError: as `documents`; the texts give no tokens; the cache folder cannot be written; a file
            changed while it was read.
    """
    items = resolve(sources)
    before = _stamps(items)
    key = _key(items, text_field, encoder, talk)
    root = Path(cache_dir).expanduser() / "shards"
    path = root / key
    with disk_errors(root, ELSEWHERE):
        found = _load(path, items, talk)
        if found is None:
            _make_folder(root)
            with _alone(root / f".lock-{key}", talk):
                found = _load(path, items, talk)  # another process may have made it meanwhile
                if found is None:
                    with folder_atomic(path, ELSEWHERE) as folder:
                        _build(folder, items, text_field, encoder, talk, limit)
                        _refuse_changed(before, _stamps(items))
                    return _made(path, items, talk)
    talk.say(f"reusing {found.ids.size:,} tokens of {found.doc_bytes.size:,} documents from {path}")
    return found


def _made(path: Path, items: list[Path | str], talk: Talk) -> Shards:
    made = _load(path, items, talk)
    if made is None:
        raise UserError(f"{path}: the token shards cannot be read back", "check the disk they lie on")
    talk.say(f"wrote {made.ids.size:,} tokens of {made.doc_bytes.size:,} documents to {path}")
    return made


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{root}: cannot be a folder, a file is in its way", ELSEWHERE) from None


@contextlib.contextmanager
def _alone(lock: Path, talk: Talk) -> Iterator[None]:
    """Hold an advisory lock on `lock`; the system gives it back when the process dies."""
    with open(lock, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            talk.say("another process is preparing the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamps(items: list[Path | str]) -> dict[Path, tuple[int, int]]:
    stamps = {}
    for item in items:
        if isinstance(item, Path):
            with reading(item):
                stat = item.stat()
            stamps[item] = (stat.st_size, stat.st_mtime_ns)
    return stamps


def _refuse_changed(before: dict[Path, tuple[int, int]], after: dict[Path, tuple[int, int]]) -> None:
    for path, stamp in before.items():
        if after[path] != stamp:
            raise UserError(f"{path}: changed while it was read", "run again when nothing writes to it")


def _megabytes(items: list[Path | str]) -> float | None:
    size = total_bytes(items)
    return None if size is None else size / MEGABYTE


def _key(items: list[Path | str], text_field: str, encoder: Encoder, talk: Talk) -> str:
    parts: list[Any] = [FORMAT, text_field, encoder.fingerprint, encoder.bos_id, encoder.eos_id]
    parts.append(encoder.vocab_size)
    if encoder.adds_space:
        parts.append("parts go on after a space")  # which earlier versions did not know
    with talk.bar("checking data", _megabytes(items), "MB") as bar:
        for item in items:
            if isinstance(item, str):
                parts += [item, BUILTIN[item.removeprefix(BUILTIN_PREFIX)].fingerprint()]
                continue
            with reading(item):
                # the same bytes mean something else under another extension
                parts += [
                    file_format(item),
                    file_hash(item, lambda count: bar.advance(count / MEGABYTE)),
                ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in found:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _build(
    folder: Path, items: list[Path | str], text_field: str, encoder: Encoder, talk: Talk, limit: Limit
) -> None:
    account = Account()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in COLUMNS}
        writer = _Writer(files, [str(item) for item in items], encoder)
        bar = stack.enter_context(talk.bar("tokenizing", _megabytes(items), "MB"))
        told = 0
        for batch in _batches(documents(items, text_field, account, limit, encoder.may_cut)):
            writer.add(batch, encoder.encode(batch))
            _tell(bar, account.input_bytes - told, writer.tokens)
            told = account.input_bytes
        _tell(bar, account.input_bytes - told, writer.tokens)
    if writer.tokens == 0:
        raise UserError("the texts give no tokens at all", "check the tokenizer with `llmctl tokenizer show`")
    write_json(folder / META, {"format": FORMAT, **writer.summary(), "account": account.to_json()})


def _tell(bar: Bar, count: int, tokens: int) -> None:
    bar.advance(count / MEGABYTE, tokens=f"{tokens / 1e6:.1f} M")


class _Column:
    """One array on disk, appended to, with its checksum."""

    def __init__(self, file: BinaryIO, dtype: str) -> None:
        self._file, self.dtype = file, dtype
        self.bytes, self.crc = 0, 0

    def append(self, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        self._file.write(raw)
        self.bytes += len(raw)
        self.crc = zlib.crc32(raw, self.crc)


class _Writer:
    """Appends encoded documents to the columns of an entry; holds one batch in memory."""

    def __init__(self, files: dict[str, BinaryIO], sources: list[str], encoder: Encoder) -> None:
        self._encoder = encoder
        self._number = {source: number for number, source in enumerate(sources)}
        wide = {"ids": "uint16" if encoder.vocab_size <= 1 << 16 else "uint32"}
        self._columns = {name: _Column(file, wide.get(name, "int64")) for name, file in files.items()}
        self._columns["doc_start"].append(np.zeros(1))
        self.tokens, self.documents = 0, 0
        self._bytes = 0  # of the document that is not complete yet

    def add(self, batch: list[Document], ids: list[list[int]]) -> None:
        """Write the parts of a batch; a document's entry is made when its last part comes."""
        before = [] if self._encoder.bos_id is None else [self._encoder.bos_id]
        after = [] if self._encoder.eos_id is None else [self._encoder.eos_id]
        pieces: list[list[int]] = []
        ends: list[int] = []
        sizes: list[int] = []
        origins: list[tuple[int, int]] = []
        for document, its in zip(batch, ids, strict=True):
            for piece in (before if document.starts else [], its, after if document.ends else []):
                pieces.append(piece)
                self.tokens += len(piece)
            self._bytes += len(document.text.encode())
            if document.ends:
                ends.append(self.tokens)
                sizes.append(self._bytes)
                origins.append((self._number[document.source], document.line or 0))
                self._bytes = 0
        self.documents += len(ends)
        flat = np.fromiter(chain.from_iterable(pieces), dtype=np.int64)
        if flat.size and not 0 <= flat.min() <= flat.max() < self._encoder.vocab_size:
            raise ValueError(f"id {flat.max()} from a tokenizer of {self._encoder.vocab_size} entries")
        self._columns["ids"].append(flat)
        self._columns["doc_start"].append(np.array(ends, dtype=np.int64))
        self._columns["doc_bytes"].append(np.array(sizes, dtype=np.int64))
        self._columns["doc_origin"].append(np.array(origins, dtype=np.int64))

    def summary(self) -> dict[str, Any]:
        """What `_load` needs to tell a whole entry from a damaged one."""
        columns = {
            name: {"dtype": column.dtype, "bytes": column.bytes, "crc32": column.crc}
            for name, column in self._columns.items()
        }
        return {"tokens": self.tokens, "documents": self.documents, "columns": columns}


def _load(path: Path, items: list[Path | str], talk: Talk) -> Shards | None:
    """The entry at `path`; None if there is none, or if it is damaged, which is said."""
    try:
        meta = _read_meta(path / META)
        columns = {name: _column(path / f"{name}.bin", meta["columns"][name]) for name in COLUMNS}
        if columns["doc_start"][-1] != columns["ids"].size:
            raise ValueError("the documents do not end where the tokens do")
        return Shards(
            ids=columns["ids"],
            doc_start=columns["doc_start"],
            doc_bytes=columns["doc_bytes"],
            doc_origin=columns["doc_origin"].reshape(-1, 2),
            sources=[str(item) for item in items],
            fingerprint=path.name,
            account=Account(**meta["account"]),
            path=path,
        )
    except (FileNotFoundError, NotADirectoryError):
        if path.is_dir():
            talk.say(f"{path} is incomplete; making it again")
        return None
    except (UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        talk.say(f"{path} is damaged ({error}); making it again")
        return None


def _read_meta(file: Path) -> dict[str, Any]:
    """The contents of `META`. Raises FileNotFoundError, and UserError or ValueError for what was never written there."""
    if not file.is_file():
        raise FileNotFoundError(file)
    meta = json.loads(read_bounded(file))
    like = Account().to_json()
    account = meta["account"]
    for name, value in account.items():
        if type(value) is not type(like[name]):
            raise ValueError(f"{META}: account.{name}")
    counts, places = account.get("counts", {}), account.get("dropped", {})
    if not all(type(count) is int for count in counts.values()) or counts.keys() != places.keys():
        raise ValueError(f"{META}: account.counts")
    return meta


def _column(path: Path, about: dict[str, Any]) -> np.ndarray:
    if about["dtype"] not in (("uint16", "uint32") if path.stem == "ids" else ("int64",)):
        raise ValueError(f"{path.name} holds no {about['dtype']}")
    size = os.path.getsize(path)
    if size != about["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes instead of {about['bytes']}")
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
    if crc != about["crc32"]:
        raise ValueError(f"the checksum of {path.name} is wrong")
    return np.memmap(path, dtype=about["dtype"], mode="r")
