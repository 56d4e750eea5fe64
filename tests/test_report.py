"""The page of a run: well-formed, self-contained, and showing the numbers it was given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from llmctl.report import HEIGHT, WIDTH, Series, curve_svg, report_html, series_of

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


def test_page_needs_nothing_from_outside_and_escapes_what_it_shows():
    page = report_html(
        "pretrain <x>", ROWS, {"tokens": 12345, "loss": 1.25}, [("Once", " <b>upon</b> & more")]
    )
    assert not re.search(r"(src|href)=|<script|url\(", page)
    assert "pretrain &lt;x&gt;" in page and "&lt;b&gt;upon&lt;/b&gt; &amp; more" in page
    assert "12,345" in page and "1.25" in page
    assert page.count("<svg") == 4
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


def test_page_of_a_run_without_metrics():
    assert "<svg" not in report_html("empty", [], {}, [])
