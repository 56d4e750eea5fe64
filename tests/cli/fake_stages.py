"""Stages that only note what they were asked, and what a command that ended is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.runs import RunResult


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
