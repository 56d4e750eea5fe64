"""The page of a run on a terminal: curves, lines that fit, text that moves no cursor, and plans."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmctl.cli.output import cell_width
from llmctl.cli.run_page import (
    draw_curve,
    loss_curve,
    metrics_rows,
    print_lines,
    print_next,
    print_plan,
    visible,
)
from llmctl.summary import Summary
from tests.program import Program

FALLING = [(step, 8.0 / step) for step in range(1, 41)]


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch):
    """Set the width of the terminal."""
    return lambda count: monkeypatch.setenv("COLUMNS", str(count))


@pytest.mark.parametrize("braille", [True, False])
@pytest.mark.parametrize("width", [24, 66, 72])
def test_a_curve_falls_from_left_to_right(width: int, braille: bool) -> None:
    lines = draw_curve(FALLING, [(40, 0.2)], width, braille=braille)
    assert max(map(len, lines)) <= width + 10
    assert lines[0].lstrip().startswith("8 ") and lines[7].lstrip().startswith("0.2 ")
    assert lines[-1].split() == ["step", "1", "40"]
    body = [line.partition("│" if braille else "|")[2] for line in lines[:8]]
    firsts = [next(i for i, c in enumerate(row) if c != " ") for row in body if row.strip()]
    assert firsts == sorted(firsts) and body[7].rstrip().endswith("o")
    assert "".join(lines).isascii() is not braille


@pytest.mark.parametrize("points", [[(1, 1.0), (2, 1.0)], [(5, 0.0), (5, 0.0)], [(1, -1e299), (2, 1e299)]])
def test_odd_curves_are_drawn(points: list[tuple[float, float]]) -> None:
    assert len(draw_curve(points, [], 30, braille=True)) == 10


def test_no_curve_of_nothing_or_without_room(columns) -> None:
    columns(80)
    rows = [{"step": s, "loss": v} for s, v in FALLING]
    assert loss_curve(rows) and not loss_curve(rows[:1])
    assert not loss_curve(
        [{"step": 1, "loss": float("nan")}, {"step": [], "loss": 2}, {"step": 10**400, "loss": 1}]
    )
    columns(30)
    assert not loss_curve(rows)


def test_damaged_lines_of_metrics_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n[]\n{"st\n\xff\n' + b"[" * 100_000 + b'\n{"step": 2}\n'
    )
    assert metrics_rows(tmp_path) == [{"step": 1}, {"step": 2}]
    assert metrics_rows(tmp_path / "none") == []


def test_commands_are_whole_at_any_width(columns, capsys: pytest.CaptureFixture[str]) -> None:
    long = "llmctl compare runs/a runs/b --data " + "x" * 60
    summary = Summary("t", [], [], [], [("llmctl chat r", "talk to it"), (long, "beside its base")])
    for width in (40, 80, 160):
        columns(width)
        print_next(summary)
        out = capsys.readouterr().out
        assert any(line.strip() == long or line.strip().startswith(f"{long}  ") for line in out.splitlines())
    assert "  llmctl chat r" in out


def test_nothing_in_a_text_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("a\x1b[2Jb\r\n\u202ec") == "a\\x1b[2Jb\\r\\n\\u202ec"
    print_lines([("error", "\x1b]0;title\x07")])
    assert "\x1b" not in capsys.readouterr().out


def test_a_hostile_manifest(llmctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/x")
    Path("runs/x/run.json").write_text(
        json.dumps({"stage": "\x1b[31msft", "status": "failed", "error": "\x1b[2J", "command": "a\x07b"})
    )
    ended = llmctl("runs", "show", "x")
    assert ended.code == 0 and "\x1b" not in ended.out and "\x07" not in ended.out
    assert "  error  \\x1b[2J\n" in ended.out


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(
        {
            "steps": 120,
            "seconds": 75.0,
            "memory_bytes": {"weights": 3 << 30, "logits": 0, "total": 3 << 30},
            "memory_available_bytes": 2 << 30,
            "out": "runs/x",
            "disk_bytes": {"checkpoints": 1 << 20, "total": 1 << 20},
            "disk_free_bytes": 5 << 30,
        }
    )
    assert capsys.readouterr().out == (
        "  steps   120\n"
        "  time    about 1:15\n"
        "  memory  3.0 GiB of 2.0 GiB available; more than there is\n"
        "  disk    1.0 MiB of 5.0 GiB free for runs/x\n"
        "\n"
        "  memory: weights    3.0 GiB\n"
        "  disk: checkpoints  1.0 MiB\n"
    )


def test_wide_names_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines([("数据", "a"), ("x", "b")])
    first, second = capsys.readouterr().out.splitlines()
    assert cell_width(first) == cell_width(second)
