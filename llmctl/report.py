"""A run as one self-contained page: curves, figures and samples, without scripts or network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 40
TICKS = 5
# dark enough on white, and told apart without colour vision by dash as well
STROKES = (
    ("#1f5fa8", ""), ("#b3470e", "7 4"), ("#2f7d4f", "2 3"), ("#7a3fa0", "12 4"),
    ("#8a6d00", "9 3 2 3"), ("#00758a", "4 2"), ("#a3194d", "1 3"), ("#444444", "14 3 3 3"),
)  # fmt: skip
NAMED, LINE = 5, 16  # names in a row below the chart, and its height

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b;
       background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #444; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f2; padding: .8rem; border-radius: 4px; }
"""


@dataclass(frozen=True)
class Series:
    """A named line of (step, value) points."""

    name: str
    points: list[tuple[float, float]]


def series_of(rows: Iterable[dict[str, Any]], key: str, name: str) -> Series:
    """The points of one metric in the rows of a metrics.jsonl; rows without it, and NaN, are passed over."""
    return Series(name, [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))])


def curve_svg(title: str, series: list[Series]) -> str:
    """A line chart over steps, or whatever is counted, as one SVG element; empty if no series has a point."""
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    points = [point for line in drawn for point in line.points]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    rows = -(-len(drawn) // NAMED)
    whole = HEIGHT + LINE * (rows - 1)
    right, (low, high, gap) = max(*steps, 1), _scale(min(values), max(values))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / right
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{whole}" fill="#fff"/>',
    ]
    for number in range(round((high - low) / gap) + 1):
        value = low + number * gap
        _, y = place((0, value))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{value:.6g}</text>')
    for number in range(TICKS + 1):
        step = right * number / TICKS
        x, _ = place((step, low))
        anchor = "end" if number == TICKS else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 22}" text-anchor="{anchor}" fill="#444">{step:,.0f}</text>'
        )
    for index, line in enumerate(drawn):
        colour, dash = STROKES[index % len(STROKES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line.points))
        stroke = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {stroke}/>')
        if len(line.points) == 1:
            x, y = place(line.points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        x, y = LEFT + 130 * (index % NAMED), HEIGHT + LINE * (index // NAMED)
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y - 8}" y2="{y - 8}" {stroke}/>')
        parts.append(f'<text x="{x + 30}" y="{y - 4}" fill="#444">{html.escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def report_html(
    title: str, rows: list[dict[str, Any]], figures: dict[str, Any], samples: list[tuple[str, str]]
) -> str:
    """The page of a run.

    Args:
        rows: of metrics.jsonl.
        figures: name -> value, shown as a table.
        samples: (prompt, text) pairs.
    """
    charts = [
        (
            "Loss (nats per token)",
            [series_of(rows, "loss", "training"), series_of(rows, "eval_loss", "evaluation")],
        ),
        ("Bits per byte", [series_of(rows, "eval_bits_per_byte", "evaluation")]),
        ("Learning rate", [series_of(rows, "learning_rate", "learning rate")]),
        ("Gradient norm", [series_of(rows, "grad_norm", "gradient norm")]),
    ]
    name = html.escape(title)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style><h1>{name}</h1>",
        _table(figures),
    ]
    for heading, series in charts:
        if svg := curve_svg(heading, series):
            parts += [f"<h2>{heading}</h2>", svg]
    if samples:
        parts.append("<h2>Samples</h2>")
        parts += [f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in samples]
    return "\n".join([*parts, "</html>", ""])


def _table(figures: dict[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(_shown(v))}</td></tr>" for k, v in figures.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Round bounds around the values, and the distance of about five grid lines: 1, 2 or 5 times a power of ten."""
    if high - low < 1e-12:
        low, high = low - max(abs(low), 1e-3) / 2, high + max(abs(high), 1e-3) / 2
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return math.floor(low / gap) * gap, math.ceil(high / gap) * gap, gap
