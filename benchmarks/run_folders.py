"""What looking at run folders costs: `runs list` over a thousand, and holding a model against its hashes while it loads.

    python benchmarks/run_folders.py [--runs 1000] [--model FOLDER]

The list is the whole command in a fresh process, best of five. Loading is `load_model` of a folder, copied as a
finished run with hashes and as a plain one, in fresh processes, in turns; the copies are in the page cache, which is
the worst case for hashing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOAD = """
import sys, time
import torch
from llmctl.model.open import open_model
began = time.perf_counter()
model = open_model(sys.argv[1], torch.float32 if sys.argv[2] == "float32" else None)
print(time.perf_counter() - began)
"""


def make_runs(root: Path, count: int) -> None:
    """Finished runs of the size a training leaves: a manifest of 6 KiB, 12 files, 2 checkpoints of 9."""
    from llmctl.runs import Run

    for number in range(count):
        path = root / f"sft-{number:04d}"
        about = {"never_seen": list(range(50)), "data": {"train": {"notes": ["x" * 60] * 60}}}
        if number % 100 == 0:
            first = path
            with Run.start("sft", path, "stage: sft\n", **about) as run:
                for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
                    (path / name).write_text(name * 100)
                for name in ("metrics.jsonl", "samples.jsonl", "report.html", "generation_config.json"):
                    (path / name).write_text("{}\n")
                for step in (100, 200):
                    folder = path / "checkpoints" / f"step-{step:06d}"
                    folder.mkdir(parents=True)
                    for part in range(9):
                        (folder / f"file{part}").write_text("x" * 1000)
                run.finish({"loss": 1.0, "eval_loss": 1.2})
        else:
            shutil.copytree(first, path)


def time_list(root: Path) -> float:
    """Seconds of `llmctl runs list`, best of five."""
    found = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "llmctl", "runs", "list", "--dir", str(root)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found.append(time.perf_counter() - began)
    return min(found)


def time_loading(model: Path, place: Path, dtype: str, times: int = 7) -> dict[str, float]:
    """Median seconds of loading a plain folder and one with recorded hashes."""
    from llmctl.runs import Run

    plain, hashed = place / "plain", place / "hashed"
    shutil.copytree(model, plain, ignore=shutil.ignore_patterns("run.json"))
    shutil.copytree(plain, place / "copy")
    with Run.start("convert", hashed, "stage: convert\n") as run:
        for file in (place / "copy").iterdir():
            os.replace(file, hashed / file.name)
        run.finish({})
    found: dict[str, list[float]] = {"plain": [], "hashed": []}
    for _ in range(times):
        for name, seconds in found.items():
            ended = subprocess.run(
                [sys.executable, "-c", LOAD, str(place / name), dtype],
                check=True,
                capture_output=True,
                text=True,
            )
            seconds.append(float(ended.stdout))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        make_runs(Path(name) / "runs", asked.runs)
        found["list_seconds"] = round(time_list(Path(name) / "runs"), 3)
        for dtype in ("stored", "float32") if asked.model else ():
            place = Path(name) / dtype
            found[f"load_{dtype}"] = time_loading(asked.model, place, dtype)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
