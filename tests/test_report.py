"""The page of a run: well-formed, self-contained, and showing the numbers it was given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from llmctl.report import HEIGHT, WIDTH, Sample, Series, curve_svg, report_html, series_of
from llmctl.summary import Summary

ROWS = [
    {"step": step, "loss": 5.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3} for step in range(1, 21)
] + [{"step": 20, "eval_loss": 1.25, "eval_bits_per_byte": 0.5}]


def places(svg: str) -> list[list[tuple[float, float]]]:
    lines = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in lines]


def test_higher_values_are_drawn_higher_and_inside():
    (line,) = places(curve_svg("t", [Series("a", [(0, 1.0), (5, 3.0), (10, 2.0)])]))
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert line[1][1] < line[2][1] < line[0][1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)


@pytest.mark.parametrize(
    "points", [[(3, 2.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 2e-9)], [(1, -5e6), (2, 7e6)]]
)
def test_odd_ranges_are_drawn(points):
    (line,) = places(curve_svg("t", [Series("a", points)]))
    assert all(math.isfinite(x) and 0 <= y <= HEIGHT for x, y in line)


def test_nothing_to_draw_is_nothing():
    assert curve_svg("t", [Series("a", [])]) == ""


def test_nan_and_missing_values_are_passed_over():
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "other": 1.0}]
    assert series_of(rows, "loss", "x").points == [(1, 1.0)]


SUMMARY = Summary(
    "x <y> (sft)",
    [("command", "llmctl sft base --data 'a & b.json'")],
    [("base model", "runs/<base>")],
    [("loss", "2.5 → 1.25")],
    [("llmctl chat 'runs/<x>'", "talk & listen")],
)


def test_page_needs_nothing_from_outside_and_escapes_what_it_shows():
    samples = [
        Sample(0, "<|user|>", "a<b"),
        Sample(20, "<|user|>", " <b>upon</b> & more", "right <i>"),
        Sample(5, "", ""),
    ]
    page = report_html(SUMMARY, ROWS, samples)
    assert not re.search(r"(src|href)=|<script|url\(|@import", page)
    for part in (
        "<title>x &lt;y&gt; (sft)</title>",
        "<dd>llmctl sft base --data &#x27;a &amp; b.json&#x27;</dd>",
        "<dd>runs/&lt;base&gt;</dd>",
        "<pre>llmctl chat &#x27;runs/&lt;x&gt;&#x27;</pre>",
        "&lt;b&gt;upon&lt;/b&gt; &amp; more",
        "<b>in the data</b><span>right &lt;i&gt;</span>",
        "(nothing)",
    ):
        assert part in page, part
    assert page.count("&lt;|user|&gt;") == 1, "a prompt stands once, its answers below it"
    assert page.index("step 0<") < page.index("step 20<")
    assert page.count("<svg") == 4
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


def test_page_is_for_phones_and_for_the_dark():
    page = report_html(SUMMARY, ROWS, [])
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "max-width: 40rem" in page


def test_page_of_a_run_without_metrics():
    assert "<svg" not in report_html(Summary("empty", [], [], []), [], [])


@pytest.mark.parametrize("last", [1, 3, 7, 120, 999, 123_456])
def test_steps_on_the_axis_are_whole_and_inside(last: int):
    svg = curve_svg("t", [Series("a", [(1, 1.0), (last, 2.0)])])
    texts = ET.fromstring(svg).findall("{http://www.w3.org/2000/svg}text")
    steps = [text for text in texts if text.attrib.get("text-anchor") == "middle"]
    shown = [int((text.text or "").replace(",", "")) for text in steps]
    assert (
        shown[0] == 0 and shown == sorted(set(shown)) and 2 <= len(shown) <= 8 and shown[-1] <= max(last, 1)
    )
    assert all(0 < float(text.attrib["x"]) <= WIDTH for text in steps)
