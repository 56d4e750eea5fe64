"""Draw the loss curve of a run as an SVG for the docs: python docs/curve.py runs/base docs/figures/base.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmctl.report import curve_svg, series_of
from llmctl.runs import METRICS


def main(run: str, target: str) -> None:
    """Training loss is left out: per token it says nothing between tokenizers, bits per byte does."""
    rows = [json.loads(line) for line in (Path(run) / METRICS).read_text(encoding="utf-8").splitlines()]
    series = series_of(rows, "eval_bits_per_byte", "bits per byte, held out")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(
        curve_svg("bits per byte over optimizer steps", [series]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
