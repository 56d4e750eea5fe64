"""The program as a process: it starts fast, loads little, and leaves quietly when nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.cli.main import SPINS, bound_spinning

HEAVY = ("torch", "transformers", "tokenizers", "datasets", "pydantic", "numpy", "rich", "click", "yaml")
PROBE = """
import sys
from llmctl.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(*(m for m in {heavy} if m in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "line", ["--help", "--version", "pretrain --help", "runs --help", "runs show --help"]
)
def test_help_loads_nothing_heavy(line: str) -> None:
    probe = PROBE.format(heavy=HEAVY)
    ended = subprocess.run(
        [sys.executable, "-c", probe, *line.split()], capture_output=True, text=True, check=True
    )
    assert ended.stdout
    assert ended.stderr == "\n"


def test_help_is_fast() -> None:
    """At most 0.4 s; the best of five, because the machine may be busy."""
    best = min(_seconds([sys.executable, "-m", "llmctl", "--help"]) for _ in range(5))
    assert best <= 0.4


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


@pytest.mark.parametrize("line", ["recipe schema", "--help", "runs list"])
def test_a_reader_that_leaves_is_no_error(line: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmctl", *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, told = process.communicate(timeout=60)
    assert told == b""
    assert process.returncode == 1


def test_a_terminal_that_cannot_show_a_character(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stage: pretrain\ntokenizer: 你好\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "llmctl", "recipe", "show", "r.yaml"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert ended.returncode == 0
    assert b"tokenizer: \\u4f60\\u597d" in ended.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPINS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_spinning_is_bounded_unless_the_user_says_how(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    monkeypatch.setattr(os, "environ", kept | given)
    bound_spinning()
    assert os.environ == kept | expected


def test_shell_completion() -> None:
    words = {"_LLMCTL_COMPLETE": "complete_bash", "COMP_WORDS": "llmctl pre", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from llmctl.cli.main import main; main()"],
        capture_output=True,
        text=True,
        env={**os.environ, **words},
    )
    assert done.stdout.split() == ["pretrain"]
    shown = subprocess.run(
        [sys.executable, "-m", "llmctl", "--show-completion", "bash"], capture_output=True, text=True
    )
    assert "_LLMCTL_COMPLETE" in shown.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("line", ["recipe schema", "--help", "runs list"])
def test_a_full_disk_behind_stdout_is_told(line: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text('{"stage": "pretrain", "status": "done"}')
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "llmctl", *line.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: the disk is full, so the result could not be written\n"
        "hint: free some space, or send stdout elsewhere\n"
    )
