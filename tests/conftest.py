"""Running the program inside the test process."""

from __future__ import annotations

import pytest

from llmctl.cli.main import main
from tests.program import Outcome, Program


@pytest.fixture
def llmctl(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """Run `llmctl WORDS…` in this process."""
    monkeypatch.delenv("LLMCTL_DEBUG", raising=False)

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(words))
        out, err = capfd.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return run
