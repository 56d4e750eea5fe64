"""A run as one self-contained page: curves, figures and samples, without scripts or network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmctl.summary import Lines, Summary

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 52
TICKS = 5
# dark enough on white, and told apart without colour vision by dash as well
STROKES = (
    ("#1f5fa8", ""), ("#b3470e", "7 4"), ("#2f7d4f", "2 3"), ("#7a3fa0", "12 4"),
    ("#8a6d00", "9 3 2 3"), ("#00758a", "4 2"), ("#a3194d", "1 3"), ("#444444", "14 3 3 3"),
)  # fmt: skip
NAMED, LINE = 5, 16  # names in a row below the chart, and its height

# Attributes of an SVG give way to a style sheet: alone a chart is dark on white, on a page it follows the page.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --soft: #5a5a5a; --line: #ddd; --box: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e6e6e3; --soft: #a3a6aa; --line: #34383d; --box: #212429; }
  svg .series-0 { stroke: #6cb0ff; } svg .series-1 { stroke: #ff9d5c; }
  svg circle.series-0 { fill: #6cb0ff; } svg circle.series-1 { fill: #ff9d5c; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 1.5rem auto 4rem; padding: 0 1rem;
       color: var(--ink); background: var(--page); }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p.soft { color: var(--soft); margin: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .title { fill: var(--ink); }
svg .page { fill: none; } svg .grid { stroke: var(--line); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .6rem .8rem; border-radius: 6px;
      margin: .2rem 0 .8rem; font: 14px/1.45 ui-monospace, monospace; }
.answer { border-left: 3px solid var(--line); padding-left: .8rem; margin: .4rem 0; }
.answer b { font-weight: 600; font-size: .85rem; color: var(--soft); display: block; }
.answer span { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  svg text { font-size: 22px; }
}
@media print { body { max-width: none; } }
"""


@dataclass(frozen=True)
class Series:
    """A named line of (step, value) points."""

    name: str
    points: list[tuple[float, float]]


def series_of(rows: Iterable[dict[str, Any]], key: str, name: str) -> Series:
    """The points of one metric in the rows of a metrics.jsonl; rows without it, and NaN, are passed over."""
    return Series(name, [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))])


def curve_svg(title: str, series: list[Series], across: str = "optimizer steps") -> str:
    """A line chart as one SVG element; empty if no series has a point. `across` says what its points are over."""
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    points = [point for line in drawn for point in line.points]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    rows = -(-len(drawn) // NAMED)
    whole = HEIGHT + LINE * (rows - 1)
    right, (low, high, gap) = max(*steps, 1), _scale(min(values), max(values))
    _, _, stride = _scale(0, right)
    stride = max(1, stride)  # there is no half of a step

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / right
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect class="page" width="{WIDTH}" height="{whole}" fill="#fff"/>',
    ]
    for number in range(round((high - low) / gap) + 1):
        value = low + number * gap
        _, y = place((0, value))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{value:.6g}</text>')
    for number in range(int(right / stride) + 1):
        x, _ = place((number * stride, low))
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 32}" text-anchor="middle" fill="#444">{number * stride:,.0f}</text>'
        )
    end = f'x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end"'
    parts.append(f'<text class="title" {end} fill="#444">{html.escape(across)}</text>')
    for index, line in enumerate(drawn):
        colour, dash = STROKES[index % len(STROKES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line.points))
        stroke = f'class="series-{index}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {stroke}/>')
        if len(line.points) == 1:
            x, y = place(line.points[0])
            parts.append(f'<circle class="series-{index}" cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        x, y = LEFT + 130 * (index % NAMED), HEIGHT + LINE * (index // NAMED)
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y - 8}" y2="{y - 8}" {stroke}/>')
        parts.append(f'<text x="{x + 30}" y="{y - 4}" fill="#444">{html.escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


CHARTS = (
    ("Loss, in nats", (("loss", "training"), ("eval_loss", "held out"))),
    ("Bits per byte, held out", (("eval_bits_per_byte", "held out"),)),
    ("Preferred pairs", (("accuracy", "training"), ("eval_accuracy", "held out"))),
    ("Learning rate", (("learning_rate", "learning rate"),)),
    ("Gradient norm", (("grad_norm", "gradient norm"),)),
)


@dataclass(frozen=True)
class Sample:
    """What the model answered to a prompt at a step, and what the data says, where it does."""

    step: int
    prompt: str
    answer: str
    reference: str = ""


def report_html(summary: Summary, rows: list[dict[str, Any]], samples: list[Sample]) -> str:
    """The page of a run.

    Args:
        rows: of metrics.jsonl.
    """
    name = html.escape(summary.title)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style><h1>{name}</h1>",
    ]
    for heading, lines in summary.sections():
        parts += [f"<h2>{heading.capitalize()}</h2>", _list(lines)]
    for heading, keys in CHARTS:
        series = [series_of(rows, key, label) for key, label in keys]
        if svg := curve_svg(heading, series):
            parts += [f"<h2>{heading}</h2>", svg]
    parts += _samples(samples)
    if summary.following:
        parts.append("<h2>Next</h2>")
        parts += [
            f'<p class="soft">{html.escape(purpose)}</p><pre>{html.escape(command)}</pre>'
            for command, purpose in summary.following
        ]
    return "\n".join([*parts, "</html>", ""])


def _list(lines: Lines) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in lines) + "</dl>"


def _samples(samples: list[Sample]) -> list[str]:
    """Every prompt once, with what was answered at each step below it."""
    parts = ["<h2>Samples</h2>"] if samples else []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        asked = [sample for sample in samples if sample.prompt == prompt]
        parts.append("<h3>Prompt</h3>" if prompt else "<h3>Without a prompt</h3>")
        parts += [f"<pre>{html.escape(prompt)}</pre>"] if prompt else []
        answers = [(f"step {one.step:,}", one.answer) for one in asked]
        reference = next((one.reference for one in asked if one.reference), "")
        for name, text in [*answers, *([("in the data", reference)] if reference else [])]:
            shown = html.escape(text) if text.strip() else "(nothing)"
            parts.append(f'<div class="answer"><b>{name}</b><span>{shown}</span></div>')
    return parts


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Round bounds around the values, and the distance of about five grid lines: 1, 2 or 5 times a power of ten."""
    if high - low < 1e-12:
        low, high = low - max(abs(low), 1e-3) / 2, high + max(abs(high), 1e-3) / 2
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return math.floor(low / gap) * gap, math.ceil(high / gap) * gap, gap
