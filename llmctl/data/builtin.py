"""Data that needs no network: what Python brings along, and a small closed world of our own."""

from __future__ import annotations

import hashlib
import os
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.data import tinyworld
from llmctl.data.document import Account, Document

# Folders of the standard library that are not documentation or readable source: tests, other
# programs, tables of character codes, and what was installed beside it.
NOT_PYDOC = (
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
)


@dataclass(frozen=True)
class Builtin:
    """Data by name.

    Args:
        documents: makes the documents; whatever it must leave out it drops in the account.
        fingerprint: changes whenever the documents would.
    """

    documents: Callable[[Account], Iterator[Document]]
    fingerprint: Callable[[], str]


@dataclass(frozen=True)
class RecordsBuiltin:
    """Records by name.

    Args:
        records: makes them, as objects of a json file.
        fingerprint: changes whenever the records would.
    """

    records: Callable[[], Iterator[dict[str, Any]]]
    fingerprint: Callable[[], str]


def _library_files() -> list[Path]:
    root = Path(os.__file__).parent
    found = []
    for above, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in NOT_PYDOC and not f.startswith("config-"))
        # `_sysconfigdata…` records how this one interpreter was built, paths and all.
        found += [
            Path(above) / name
            for name in sorted(names)
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return [file for file in found if file.parent.name != "pydoc_data"]


def _pydoc_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def pydoc(account: Account) -> Iterator[Document]:
    """The language reference that `help()` shows, then the standard library's sources, sorted."""
    number = 0
    for text in _pydoc_topics().values():
        number += 1
        yield Document(text, "builtin:pydoc", number)
    for file in _library_files():
        number += 1
        try:
            with tokenize.open(file) as stream:
                yield Document(stream.read(), "builtin:pydoc", number)
        except (OSError, SyntaxError, UnicodeDecodeError):
            account.drop("a source file that cannot be read", str(file))


def _pydoc_fingerprint() -> str:
    sizes = [f"{file.name} {file.stat().st_size}" for file in _library_files()]
    return _hash("pydoc", sys.version, *sizes)


def tiny_world(account: Account) -> Iterator[Document]:
    """The statements of the tiny world with seed 0."""
    for number, text in enumerate(tinyworld.statements(seed=0), start=1):
        yield Document(text, "builtin:tinyworld", number)


def tiny_instructions(split: tinyworld.Split) -> Iterator[dict[str, Any]]:
    """Questions about one half of the tiny world with seed 0, and their answers."""
    for record in tinyworld.instructions(split):
        yield {**record}


def tiny_preferences(split: tinyworld.Split) -> Iterator[dict[str, Any]]:
    """Two introductions of each person of one half of the tiny world with seed 0."""
    for pair in tinyworld.preferences(split):
        yield {**pair}


def _tinyworld_fingerprint() -> str:
    return _hash("tinyworld", str(tinyworld.VERSION))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# To add one: a generator above, a line here, a paragraph in docs/data.md.
BUILTIN: dict[str, Builtin] = {
    "pydoc": Builtin(pydoc, _pydoc_fingerprint),
    "tinyworld": Builtin(tiny_world, _tinyworld_fingerprint),
}

BUILTIN_RECORDS: dict[str, RecordsBuiltin] = {
    "tinyworld-instructions": RecordsBuiltin(partial(tiny_instructions, "train"), _tinyworld_fingerprint),
    "tinyworld-instructions-heldout": RecordsBuiltin(
        partial(tiny_instructions, "heldout"), _tinyworld_fingerprint
    ),
    "tinyworld-preferences": RecordsBuiltin(partial(tiny_preferences, "train"), _tinyworld_fingerprint),
    "tinyworld-preferences-heldout": RecordsBuiltin(
        partial(tiny_preferences, "heldout"), _tinyworld_fingerprint
    ),
}
