"""What goes to stdout: JSON for programs, aligned plain text for people. No colours, no boxes.

Text of files and models (paths, metrics, answers, tokens) may hold what a terminal obeys: escape sequences, or marks that
reverse the order of what is read. So nothing in `cli/` calls `print`: `echo` and the functions over it write codes for such
characters. Exact text is written in two places: JSON, which has codes of its own, and an answer that goes to a pipe.
"""

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

SIZES = ("memory_bytes", "disk_bytes")
UNSEEN = ("Mn", "Me", "Cf")  # categories of characters that take no column
JOINERS = "\u200c\u200d"  # invisible, but harmless, and Persian and emoji need them
NARROWEST = 20  # columns; a text is not broken into less


def echo(
    *values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False
) -> None:
    """`print`, with codes for what a terminal would obey; lines and tabs stay."""
    print(harmless(sep.join(map(str, values))), end=end, file=file, flush=flush)


def harmless(text: str) -> str:
    """A text without what a terminal would obey: codes stand for control characters other than line breaks."""
    return text if text.isascii() and text.isprintable() else "".join(map(_seen, text))


def one_line(text: str) -> str:
    """`harmless`, with codes for line breaks and tabs too."""
    return harmless(text.replace("\n", "\\n").replace("\t", "\\t"))


def _seen(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in JOINERS:
        return character
    if character == "\r" or unicodedata.category(character) == "Zs":
        return "" if character == "\r" else character
    return character.encode("unicode_escape", "surrogatepass").decode()


def print_json(value: Any) -> None:
    """One JSON document. Not-a-number and infinity, which JSON lacks, become null."""
    print(json_text(_finite(value), indent=2))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON whose strings are exact, with codes for the characters that `echo` has codes for too."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(c if len(_seen(c)) == 1 else json.dumps(c)[1:-1] for c in text)


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
    titles = [figure(title) for title in header]
    cells = [[figure(cell) for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] is None for row in rows)
        for i in range(len(header))
    ]
    wide = [max(cell_width(line[i]) for line in [titles, *cells]) for i in range(len(header))]
    room = shutil.get_terminal_size().columns - sum(wide[:-1]) - 2 * (len(header) - 1)
    for line in [titles, *cells]:
        padded = []
        for text, width, right in zip(line[:-1], wide, numeric, strict=False):
            gap = " " * (width - cell_width(text))
            padded.append(gap + text if right else text + gap)
        before = "".join(f"{text}  " for text in padded)
        last = " " * (wide[-1] - cell_width(line[-1])) + line[-1] if numeric[-1] else line[-1]
        if sys.stdout.isatty() and room >= NARROWEST and cell_width(last) > room:
            last = ("\n" + " " * cell_width(before)).join(textwrap.wrap(last, room))
        echo((before + last).rstrip())


def print_listing(values: dict[str, Any], indent: int = 0, in_bytes: bool = False) -> None:
    """`key  value` lines; a section within is set in by two spaces, a list has a line per entry.

    What is named in `SIZES`, or lies in a section that is (`in_bytes`), is shown as 1.5 GiB; other
    counts of bytes are results and stay exact.
    """
    values = {one_line(key): None if value in ({}, []) else value for key, value in values.items()}
    plain = [key for key, value in values.items() if not isinstance(value, (dict, list))]
    wide = max((cell_width(key) for key in plain), default=0)
    margin = " " * indent
    for key, value in values.items():
        if isinstance(value, dict):
            echo(f"{margin}{key}")
            print_listing(value, indent + 2, key in SIZES)
        elif isinstance(value, list):
            echo(f"{margin}{key}")
            for entry in value:
                text = "  ".join(figure(v) for v in entry.values()) if isinstance(entry, dict) else entry
                echo(f"{margin}  {figure(text)}")
        else:
            sized = isinstance(value, (int, float)) and (in_bytes or key in SIZES)
            text = size(value) if sized else figure(value)
            echo(f"{margin}{key}{' ' * (wide - cell_width(key))}  {text}")


def figure(value: Any) -> str:
    """A value as a person reads it: 12,345 · 0.01234 · yes · -."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    return one_line(str(value))


def size(number: float) -> str:
    """Bytes in powers of 1024: 512 B, 1.5 KiB, 12 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    whole = units[0] == "B" or number >= 10
    return f"{number:.0f} {units[0]}" if whole else f"{number:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """0:42, 12:34, 1:02:03, 2d 03h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
