"""Values as a person reads them: one form for the terminal, for reports and for model cards."""

from __future__ import annotations

import math
from typing import Any


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
    return str(value)


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
