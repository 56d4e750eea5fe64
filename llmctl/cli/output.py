"""What goes to stdout: JSON for programs, aligned plain text for people. No colours, no boxes."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

from llmctl.figures import duration as duration
from llmctl.figures import figure as figure
from llmctl.figures import size as size

SIZES = ("memory_bytes", "disk_bytes")
UNSEEN = ("Mn", "Me", "Cf")  # categories of characters that take no column
NARROWEST = 20  # columns; a text is not broken into less


def print_json(value: Any) -> None:
    """One JSON document. Not-a-number and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns two spaces apart; a column of numbers is set to the right.

    On a terminal the last column is broken into lines that fit.
    """
    cells = [[figure(cell) for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] is None for row in rows)
        for i in range(len(header))
    ]
    wide = [max(cell_width(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    room = shutil.get_terminal_size().columns - sum(wide[:-1]) - 2 * (len(header) - 1)
    for line in [list(header), *cells]:
        padded = []
        for text, width, right in zip(line[:-1], wide, numeric, strict=False):
            gap = " " * (width - cell_width(text))
            padded.append(gap + text if right else text + gap)
        before = "".join(f"{text}  " for text in padded)
        last = " " * (wide[-1] - cell_width(line[-1])) + line[-1] if numeric[-1] else line[-1]
        if sys.stdout.isatty() and room >= NARROWEST and cell_width(last) > room:
            last = ("\n" + " " * cell_width(before)).join(textwrap.wrap(last, room))
        print((before + last).rstrip())


def print_listing(values: dict[str, Any], indent: int = 0, in_bytes: bool = False) -> None:
    """`key  value` lines; a section within is set in by two spaces, a list has a line per entry.

    What is named in `SIZES`, or lies in a section that is (`in_bytes`), is shown as 1.5 GiB; other
    counts of bytes are results and stay exact.
    """
    values = {key: None if value in ({}, []) else value for key, value in values.items()}
    plain = [key for key, value in values.items() if not isinstance(value, (dict, list))]
    wide = max((cell_width(key) for key in plain), default=0)
    margin = " " * indent
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{margin}{key}")
            print_listing(value, indent + 2, key in SIZES)
        elif isinstance(value, list):
            print(f"{margin}{key}")
            for entry in value:
                text = "  ".join(figure(v) for v in entry.values()) if isinstance(entry, dict) else entry
                print(f"{margin}  {figure(text)}")
        else:
            sized = isinstance(value, (int, float)) and (in_bytes or key in SIZES)
            text = size(value) if sized else figure(value)
            print(f"{margin}{key}{' ' * (wide - cell_width(key))}  {text}")


def age(stamp: str | None) -> str:
    """How long ago a manifest's time stamp was: 5 s, 12 min, 3 h, 2 d; - if it cannot be read."""
    from datetime import datetime

    try:
        seconds = time.time() - datetime.strptime(stamp or "", "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return "-"
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def cell_width(text: str) -> int:
    """Terminal columns a text takes: wide East Asian characters take two, marks on others none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(c) in UNSEEN else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor and may be coloured."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
