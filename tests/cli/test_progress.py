"""Progress: the same words on a terminal and in a log, within the width there is."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys

import pytest

from llmctl.cli.progress import LiveTalk, Pace, PlainTalk, make_talk
from llmctl.talk import rows_told


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(total: float | None = 1000, unit: str = "steps") -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace("pretrain", total, unit, clock), clock


def test_count_rate_and_time_left() -> None:
    pace, clock = paced()
    assert pace.parts() == ["0/1,000 steps"]
    for _ in range(11):
        clock.now += 2
        pace.advance(10, loss="3.21")
    assert pace.parts() == ["110/1,000 steps", "5.0 steps/s", "2:58 left", "loss 3.21"]
    assert pace.summary() == "pretrain: 110 steps in 0:22 · 5.0 steps/s · loss 3.21"


def test_resuming_does_not_count_as_speed() -> None:
    pace, clock = paced()
    pace.advance(500)
    clock.now += 10
    pace.advance(10)
    assert pace.rate == 1.0


def test_the_rate_forgets_a_slow_beginning() -> None:
    pace, clock = paced()
    pace.advance()
    clock.now += 600
    for _ in range(200):
        clock.now += 1
        pace.advance(2)
    assert pace.rate == pytest.approx(2.0)


def test_unknown_total_shows_time_and_no_bar() -> None:
    pace, clock = paced(None, "MB")
    clock.now += 65
    pace.advance(1.25)
    assert pace.parts() == ["1.2 MB", "1:05"]
    assert pace.fitted(80)[1] == 0


@pytest.mark.parametrize("width", [20, 40, 60, 79, 159])
def test_a_line_never_exceeds_the_width(width: int) -> None:
    pace, clock = paced()
    for _ in range(3):
        clock.now += 1
        pace.advance(1, loss="3.210", lr="3.0e-4", tokens="12,345/s", memory="1.3 GiB")
    label, bar, text = pace.fitted(width)
    assert len(label) + 1 + (bar + 1 if bar else 0) + len(text) <= width
    assert ("memory" in text) == (width == 159)
    assert ("left" in text) == (width >= 60)


def test_a_log_gets_few_plain_lines() -> None:
    clock, log = Clock(), io.StringIO()
    talk = PlainTalk(log, clock)
    talk.say("begin")
    with talk.bar("pretrain", 3600, "steps") as bar:
        for _ in range(3600):
            clock.now += 1
            bar.advance(loss="2.5")
            with talk.bar("evaluate", 1, "rows") as inner:
                inner.advance()
    lines = log.getvalue().splitlines()
    assert lines[:2] == ["begin", "pretrain: 5/3,600 steps · 1.0 steps/s · 59:55 left · loss 2.5"]
    assert lines[-1] == "pretrain: 3,600 steps in 1:00:00 · 1.0 steps/s · loss 2.5"
    assert 60 <= len(lines) <= 120, "an hour takes a line a minute, not one every five seconds"
    assert log.getvalue().replace("\n", "").isprintable()


def test_short_or_failed_work_leaves_no_line() -> None:
    clock, log = Clock(), io.StringIO()
    talk = PlainTalk(log, clock)
    with talk.bar("load", 1, "files") as bar:
        clock.now += 1
        bar.advance()
    with pytest.raises(ValueError), talk.bar("load", 1, "files"):
        clock.now += 60
        raise ValueError
    assert log.getvalue() == ""


def test_a_log_reader_that_leaves_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone:
        talk = PlainTalk(gone)
        talk.say("into the void")
        talk.say("again")
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


@pytest.mark.parametrize(
    ("tty", "variables", "kind"),
    [
        (True, {"TERM": "xterm"}, LiveTalk),
        (False, {"TERM": "xterm"}, PlainTalk),
        (True, {"TERM": "dumb"}, PlainTalk),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, PlainTalk),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, LiveTalk),
    ],
)
def test_which_display(
    tty: bool, variables: dict[str, str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    assert type(make_talk()) is kind


DRAWN = """
import time
from llmctl.cli.progress import make_talk
talk = make_talk()
with talk.bar("pretrain", 100, "steps") as bar:
    for _ in range(5):
        time.sleep(0.1)
        bar.advance(10, loss="2.5")
    talk.say("[bold]half way[/bold]")
    print("data", flush=True)
    time.sleep(0.3)
"""


def test_a_terminal_gets_a_live_line_and_stdout_stays_clean() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRAWN],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": ""},
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=60)
    drawn = b""
    while select.select([ours], [], [], 0.2)[0]:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not block:
            break
        drawn += block
    os.close(ours)
    assert out == b"data\n"
    assert "50/100 steps" in drawn.decode()
    assert "[bold]half way[/bold]" in drawn.decode(), "text is not markup"


def test_work_that_cannot_be_counted_shows_how_long_it_lasts() -> None:
    log, clock = io.StringIO(), Clock()
    talk = PlainTalk(log, clock)
    with talk.bar("folding", None, "") as bar:
        clock.now += 7
        bar.advance(0)
        clock.now += 60
    assert log.getvalue().splitlines() == ["folding: 0:07", "folding: 1:07"]


def test_rows_are_told_with_what_is_left() -> None:
    log, clock = io.StringIO(), Clock()
    talk = PlainTalk(log, clock)
    for _ in rows_told([{"input_ids": [0, 0]}] * 4, 8, "scoring", talk):
        clock.now += 4
    assert log.getvalue().splitlines() == [
        "scoring: 4/8 rows · 0.5 rows/s · 0:08 left",
        "scoring: 8/8 rows · 0.5 rows/s",
        "scoring: 8 rows in 0:16 · 0.5 rows/s",
    ]
