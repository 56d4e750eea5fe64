"""The program in an empty folder, and stages that only note how they were called."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

import llmctl.stages as stages
from tests.cli.fake_stages import Calls
from tests.program import Program


@pytest.fixture
def llmctl_(llmctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Run `llmctl WORDS…` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return llmctl


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stages replaced by fakes, so that no test of the command line loads torch or a model."""
    noted = Calls()
    for name in ("pretrain", "tokenizer", "generate", "evaluate", "quickstart"):
        module = types.SimpleNamespace(
            run=getattr(noted, name),
            conversation=noted.conversation,
            evaluate=lambda tokenizers, data, text_field: [
                {"tokenizer": t, "bytes_per_token": 4.25, "field": text_field} for t in tokenizers
            ],
            show=lambda tokenizer, text: [(7, "Ġa\n", b" a"), (1234, "ä", b"\xe4")],
        )
        monkeypatch.setattr(stages, name, module, raising=False)
    return noted
