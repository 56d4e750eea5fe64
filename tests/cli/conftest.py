"""Running the program inside the test process."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

import llmctl.stages
from llmctl.cli.main import main
from tests.cli.fake_stages import Calls, Outcome, Program


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
