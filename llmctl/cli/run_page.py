"""A run on a terminal: the page of `llmctl runs show`, and the table that a stage ends with."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.cli.output import cell_width, duration, figure, print_json, size
from llmctl.errors import UserError
from llmctl.runs import METRICS, read_manifest, status_of
from llmctl.summary import Lines, Summary, summarize

CURVE_ROWS = 8  # lines of text that a curve takes, without its axis
NARROWEST_CURVE, WIDEST_CURVE = 24, 72  # columns
MARGIN = 2
LONGEST = 16 << 20  # bytes of metrics.jsonl that a page reads
COSTS = ("memory_bytes", "memory_available_bytes", "disk_bytes", "disk_free_bytes")  # of a plan
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character: by column, then by row
BRAILLE = 0x2800

Points = list[tuple[float, float]]


def metrics_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that can be read; a line that was cut short by a crash is passed over."""
    file = run / METRICS
    rows: list[dict[str, Any]] = []
    if not file.is_file():
        return rows
    with open(file, encoding="utf-8", errors="replace") as opened:
        for line in opened.read(LONGEST).splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def print_run(folder: Path, manifest: Mapping[str, Any], size_bytes: int | None = None) -> None:
    """The whole page: what the run is, what from, how it went with its curve, and what to do next.

    `manifest` holds the status of now.
    """
    rows = metrics_rows(folder)
    summary = summarize(str(folder), manifest, rows, size_bytes)
    print(visible(summary.title))
    for heading, lines in summary.sections():
        print(f"\n{heading}")
        print_lines(lines)
    curve = loss_curve(rows)
    if curve:
        print("", *curve, sep="\n")
    print_next(summary)


def show_result(stage: str, result: Any, as_json: bool) -> None:
    """How a stage ended, in the words of `runs show`, or the plan of a dry run.

    `result` is the RunResult of the stage; that of a dry run has no path.
    """
    if result.path is None:
        (print_json if as_json else print_plan)(result.metrics)
    elif as_json:
        print_json({"run": result.path, "metrics": result.metrics})
    else:
        summary = _summary_of(stage, Path(result.path), result.metrics)
        print(f"run  {visible(str(result.path))}")
        print_lines(summary.went)
        print_next(summary)


def _summary_of(stage: str, run: Path, metrics: dict[str, Any]) -> Summary:
    try:
        manifest = read_manifest(run)
        manifest["status"] = status_of(run, manifest)
    except UserError:  # somebody removed it meanwhile
        manifest = {"stage": stage}
    return summarize(str(run), manifest | {"metrics": metrics}, metrics_rows(run))


def print_plan(plan: dict[str, Any]) -> None:
    """What a run will do and take; memory and disk beside what there is of them."""
    told = dict(plan)
    seconds, out = told.pop("seconds", None), told.pop("out", None)
    lines = [(name.replace("_", " "), figure(value)) for name, value in told.items() if name not in COSTS]
    if seconds is not None:
        lines.append(("time", f"about {duration(seconds)}"))
    parts: Lines = []
    for name, key, there, word in (
        ("memory", "memory_bytes", "memory_available_bytes", "available"),
        ("disk", "disk_bytes", "disk_free_bytes", f"free for {out}"),
    ):
        if isinstance(told.get(key), dict):
            needed, has = told[key]["total"], told.get(there)
            beside = f" of {size(has)} {word}" if has is not None else ""
            short = "; more than there is" if has is not None and needed > has else ""
            lines.append((name, f"{size(needed)}{beside}{short}"))
            parts += [
                (f"{name}: {part}", size(count))
                for part, count in told[key].items()
                if part != "total" and count
            ]
    print_lines(lines)
    if parts:
        print()
        print_lines(parts)


def print_next(summary: Summary) -> None:
    """The commands one would run next, each whole on a line of its own so that it can be copied."""
    if not summary.following:
        return
    print("\nnext")
    room = shutil.get_terminal_size().columns - MARGIN
    wide = max(cell_width(visible(command)) for command, _ in summary.following)
    beside = all(wide + 2 + cell_width(purpose) <= room for _, purpose in summary.following)
    for command, purpose in summary.following:
        shown = visible(command)
        if beside:
            print(f"  {shown}{' ' * (wide - cell_width(shown))}  {purpose}")
        else:
            print(f"  # {purpose}\n  {shown}")


def print_lines(lines: Lines) -> None:
    """Names and texts in two columns; on a terminal a long text is broken into lines that fit."""
    wide = max(cell_width(name) for name, _ in lines)
    room = shutil.get_terminal_size().columns - MARGIN - wide - 2
    for name, text in lines:
        before = f"{' ' * MARGIN}{name}{' ' * (wide - cell_width(name))}  "
        shown = visible(text)
        if sys.stdout.isatty() and cell_width(shown) > room >= NARROWEST_CURVE:
            parts = textwrap.wrap(shown, room, break_on_hyphens=False)
            shown = f"\n{' ' * (MARGIN + wide + 2)}".join(parts)
        print(before + shown)


def visible(text: str) -> str:
    """A text in which nothing moves the cursor: what cannot be printed is written as its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def loss_curve(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The losses of a training as lines of text; none if there are fewer than two points, or no room."""
    training, held = _points(rows, "loss"), _points(rows, "eval_loss")
    columns = min(shutil.get_terminal_size().columns - 14, WIDEST_CURVE)
    if len(training) < 2 or columns < NARROWEST_CURVE:
        return []
    utf8 = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    marks = f"{'⣀⣀' if utf8 else '**'} training" + ("   o held out" if held else "")
    return [f"  loss   {marks}", *draw_curve(training, held, columns, braille=utf8)]


def draw_curve(line: Points, marks: Points, columns: int, *, braille: bool) -> list[str]:
    """A line over steps, with `o` at the marks; the axes are labelled with their ends.

    Args:
        line: at least one point, by step.
        columns: characters of the plot itself.
        braille: eight dots a character; else one star.
    """
    across, down = (2, 4) if braille else (1, 1)
    wide, high = columns * across, CURVE_ROWS * down
    steps, values = zip(*[*line, *marks], strict=True)
    first, last, low, top = min(steps), max(steps), min(values), max(values)
    span, spread = (last - first) or 1.0, (top - low) or 1.0

    def place(step: float, value: float, width: int, height: int) -> tuple[int, int]:
        return round((step - first) / span * (width - 1)), round((top - value) / spread * (height - 1))

    cells = [[0] * columns for _ in range(CURVE_ROWS)]
    for x, y in _joined([place(*point, wide, high) for point in line]):
        cells[y // down][x // across] |= DOTS[x % across][y % down]
    shown = [[(chr(BRAILLE + cell) if braille else "*") if cell else " " for cell in row] for row in cells]
    for point in marks:
        x, y = place(*point, columns, CURVE_ROWS)
        shown[y][x] = "o"
    labels = [figure(float(top)), *[""] * (CURVE_ROWS - 2), figure(float(low))]
    gutter = max(map(len, labels))
    side, corner, flat = ("│", "└", "─") if braille else ("|", "+", "-")
    body = [
        f"  {label:>{gutter}} {side}{''.join(row).rstrip()}" for label, row in zip(labels, shown, strict=True)
    ]
    start, end = f"step {first:,.0f}", f"{last:,.0f}"
    gap = " " * max(1, columns - len(start) - len(end))
    return [*body, f"  {'':>{gutter}} {corner}{flat * columns}", f"  {'':>{gutter}}  {start}{gap}{end}"]


def _joined(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots of a line through places, in order of x."""
    dots = places[:1]
    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        dots += [
            (round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count))
            for i in range(1, count + 1)
        ]
    return dots


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [
        (row["step"], row[key])
        for row in rows
        if _is_number(row.get("step")) and row["step"] >= 0 and _is_number(row.get(key))
    ]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300 and math.isfinite(value)
