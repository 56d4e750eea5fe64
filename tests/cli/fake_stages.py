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
        path = None if words.get("dry_run") else Path("runs/x")
        return RunResult(path, {"loss": 2.5, "steps": 12345, "lost": float("nan")})

    def tokenizer(self, recipe: Any, talk: Any, **words: Any) -> RunResult:
        self._note(recipe, {})
        return RunResult(Path("runs/tok"), {"vocab_size": 500})

    def generate(self, recipe: Any, prompt: str, talk: Any, on_text: Any) -> dict[str, Any]:
        self._note(recipe, {"prompt": prompt})
        if on_text is not None:
            on_text("one ")
            on_text("two")
        return {"text": "one two", "tokens": [1, 2], "tokens_per_second": 10.0}

    def evaluate(self, recipe: Any, talk: Any, **words: Any) -> dict[str, Any]:
        self._note(recipe, {})
        return {"loss": 1.0, "bits_per_byte": 0.75, "tokens": 20000}

    def quickstart(self, out: Any, seed: Any, device: Any, talk: Any) -> dict[str, Any]:
        self._note(None, {"out": out, "seed": seed, "device": device})
        empty = dict.fromkeys(("loss", "exact_match", "change", "preference_accuracy"))
        share = {"exact_match": 0.9, "exact_match_low": 0.88, "exact_match_high": 0.91}
        change = {"change": -0.004, "change_low": -0.012, "change_high": 0.004}
        kept = {
            "preference_accuracy": 0.951,
            "preference_accuracy_low": 0.94,
            "preference_accuracy_high": 0.96,
        }
        rows = [
            empty | {"stage": "tokenizer", "seconds": 1.25, "size_bytes": 39430},
            empty
            | {"stage": "dpo", "seconds": 35, "size_bytes": 3 << 20, "loss": 0.25}
            | share
            | change
            | kept,
        ]
        exchange = {"prompt": "Who?", "answer": "Ada. ", "expected": "Ada."}
        return {
            "rows": rows,
            "seconds": 61.0,
            "peak_memory_bytes": 1 << 30,
            "model": "runs/o",
            "exchange": exchange,
        }

    def conversation(self, model: Any, seed: Any, device: Any) -> Any:
        return (model, seed, device)

    def _note(self, recipe: Any, words: dict[str, Any]) -> None:
        self.recipe, self.words = recipe, words
        if self.error is not None:
            raise self.error
