"""Running the program inside the test process, with stages that only note what they were asked."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import llmctl.stages
from llmctl.cli.main import main
from llmctl.runs import RunResult


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Program = Callable[..., Outcome]


@pytest.fixture
def llmctl_(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Run `llmctl WORDS…` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMCTL_DEBUG", raising=False)

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(words))
        out, err = capfd.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return run


@dataclass
class Calls:
    """What fake stages were called with, and what they shall do."""

    recipe: Any = None
    words: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None

    def pretrain(self, recipe: Any, talk: Any, **words: Any) -> RunResult:
        self._note(recipe, words)
        return RunResult(Path("runs/x"), {"loss": 2.5, "steps": 12345, "lost": float("nan")})

    def tokenizer(self, recipe: Any, talk: Any) -> RunResult:
        self._note(recipe, {})
        return RunResult(Path("runs/tok"), {"vocab_size": 500})

    def generate(self, recipe: Any, prompt: str, talk: Any, on_text: Any) -> dict[str, Any]:
        self._note(recipe, {"prompt": prompt})
        if on_text is not None:
            on_text("one ")
            on_text("two")
        return {"text": "one two", "tokens": [1, 2], "tokens_per_second": 10.0}

    def evaluate(self, recipe: Any, talk: Any) -> dict[str, Any]:
        self._note(recipe, {})
        return {"loss": 1.0, "bits_per_byte": 0.75, "tokens": 20000}

    def quickstart(self, out: Any, seed: Any, device: Any, talk: Any) -> dict[str, Any]:
        self._note(None, {"out": out, "seed": seed, "device": device})
        rows = [{"stage": "tokenizer", "seconds": 1.25, "size": "500 entries", "figure": 2.4}]
        return {"rows": rows, "sample": {"prompt": "Who?", "text": " Ada."}}

    def _note(self, recipe: Any, words: dict[str, Any]) -> None:
        self.recipe, self.words = recipe, words
        if self.error is not None:
            raise self.error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stages replaced by fakes, so that no test of the command line loads torch or a model."""
    noted = Calls()
    for name in ("pretrain", "tokenizer", "generate", "evaluate", "quickstart"):
        module = types.SimpleNamespace(
            run=getattr(noted, name),
            evaluate=lambda tokenizers, data, text_field: [
                {"tokenizer": t, "bytes_per_token": 4.25, "field": text_field} for t in tokenizers
            ],
            show=lambda tokenizer, text: [(7, "Ġa\n", b" a"), (1234, "ä", b"\xe4")],
        )
        monkeypatch.setattr(llmctl.stages, name, module, raising=False)
    return noted
