"""What a case of bad input is, and what must hold for each.

The program runs in a folder that holds a corpus `data.jsonl`, a tokenizer run `tok` and a model `base`.
After an error every file there must have the bytes it had before, and no other may have appeared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.program import Outcome, Program
from tests.stages.conftest import TRAIN

Make = Callable[[Path], object]
WEIGHTS = "model.safetensors"
NEW = f"{' '.join(TRAIN)} --out out"  # a command line that would work
EXPLAIN = "`llmctl recipe show pretrain` explains"


@dataclass(frozen=True)
class Bad:
    """One bad input."""

    words: str
    error: str
    hint: str
    make: Make | None = None
    code: int = 1


def file(name: str, content: str | bytes) -> Make:
    """A maker of one file."""

    def make(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def folder(name: str) -> Make:
    """A maker of an empty folder."""
    return lambda here: (here / name).mkdir()


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: path -> hash of its bytes, or what else it is."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def told(outcome: Outcome, bad: Bad) -> None:
    """Assert that a command ended with this error, said in its two lines and in no others."""
    lines = outcome.err.splitlines()
    assert [line for line in lines if "error" in line.lower()] == [f"error: {bad.error}"], outcome.err
    assert lines[-2:] == [f"error: {bad.error}", f"hint: {bad.hint}"], outcome.err
    assert len([line for line in lines if line.startswith("hint: ")]) == 1
    assert "Traceback" not in outcome.err
    assert outcome.code == bad.code
    assert outcome.out == ""


def check(bad: Bad, here: Path, llmctl: Program) -> None:
    """Run a case and assert what it says and that it changed nothing."""
    if bad.make is not None:
        bad.make(here)
    before = snapshot(here)
    outcome = llmctl(*bad.words.split())
    told(outcome, bad)
    assert snapshot(here) == before


def cases(table: dict[str, Bad]) -> pytest.MarkDecorator:
    """The table as parameters of a test."""
    return pytest.mark.parametrize("bad", table.values(), ids=[name.replace(" ", "-") for name in table])


def unsealed(run: Path) -> Path:
    """A run whose manifest holds no hashes of its files any more, so that a test may change them."""
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"outputs": None}))
    return run
