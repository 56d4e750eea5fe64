"""Everything that only a GPU can tell, in one run of at most nine minutes: checks, speeds, and the ceilings above them.

Each part runs in a process of its own under a time limit, and each row is kept as soon as it is known: a crash, a hang,
an exhausted memory or a missing package loses nothing but what it stopped. Written into --out, and renewed all the time:

    gpu.json    every row of every part
    gpu.md      one Markdown table, for docs/performance.md; it is printed at the end
    gpu.log     what the parts printed

    python benchmarks/gpu.py                                  on a CUDA device
    python benchmarks/gpu.py --device cpu --tiny --out DIR    the dry run: every line, with tiny sizes
    python benchmarks/gpu.py --parts device,core,kernels      some of it, in this order

Exit code: 0 if no check failed, 1 if a part failed or ran out of time, 2 for wrong options. A part or case whose package is
missing is skipped, which is no failure.

It needs Python 3.11, torch 2.11, transformers 5.17, and of llmctl's other requirements pydantic, pyyaml, numpy, psutil, jinja2,
tokenizers and safetensors. On a machine without network or installed packages, carry wheels of `pydantic`,
`pydantic-core`, `annotated-types` and `typing-inspection`; for the command line `typer`, `rich` and `markdown-it-py` too.
peft, bitsandbytes and triton are used where they are there; trl, datasets and accelerate are not needed. The folder is not
installed: run it from the repository as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_parts.running import Part, Result, Settings, failures, run_parts
from gpu_parts.table import markdown

BUDGET = 540.0
TINY_LIMIT = 500.0  # seconds of a part in a dry run
# in order of what is wanted most; the limits add up to more than the budget, since most parts end well before theirs
PARTS: dict[str, Part] = {
    "device": Part("gpu_parts.device:run", 40, title="what the device is, and its ceilings"),
    "core": Part("gpu_parts.core:run", 50, title="logits, gradients, packed rows, decoding"),
    "pretrain-124m": Part("gpu_parts.pretraining:run_124m", 130, title="pretraining, 124 M parameters"),
    "decoding": Part("gpu_parts.decoding:run", 80, title="decoding, 1 B parameters"),
    "flash": Part("gpu_parts.flash:run", 90, title="the Triton attention kernels"),
    "kernels": Part("gpu_parts.kernels:run", 60, title="the other kernels against their references"),
    "patterns": Part("gpu_parts.patterns:run", 60, title="every variant of the model"),
    "compile": Part("gpu_parts.training:run_compiled", 70, title="compiled training steps"),
    "training": Part("gpu_parts.training:run", 40, title="checkpoints and resumed runs"),
    "quantized": Part("gpu_parts.quantized:run", 40, title="quantized weights"),
    "lora": Part("gpu_parts.lora:run", 50, needs=("peft",), title="a step of LoRA"),
    "pretrain-350m": Part("gpu_parts.pretraining:run_350m", 110, title="pretraining, 350 M parameters"),
}


def main() -> None:
    given = parse(sys.argv[1:])
    given.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.device, given.tiny, given.budget, given.out / "gpu.log")
    settings.log.write_bytes(b"")
    chosen = {name: PARTS[name] for name in given.parts}
    if given.tiny:  # on a CPU it is the compiler that takes long
        chosen = {name: dataclasses.replace(part, seconds=TINY_LIMIT) for name, part in chosen.items()}
    head = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "device": given.device,
        "tiny": given.tiny,
        "budget": given.budget,
    }
    began = time.monotonic()

    def publish(results: dict[str, Result]) -> None:
        document = head | {"seconds": time.monotonic() - began, "parts": results}
        replace(given.out / "gpu.json", json.dumps(document, indent=1, default=float))
        replace(given.out / "gpu.md", as_table(document))
        _tell(results)

    results = run_parts(chosen, settings, publish)
    print("\n" + (given.out / "gpu.md").read_text(encoding="utf-8"))
    for name, result in results.items():
        reason = f": {result['reason']}" if result["reason"] else ""
        print(f"{name:14} {result['status']:10} {result['seconds']:6.1f} s{reason}")
    sys.exit(1 if failures(results) else 0)


def parse(words: list[str]) -> argparse.Namespace:
    """The options, checked; ends the process with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="their names with commas (default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a dry run")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder (default gpu-results)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help=f"seconds for everything (default {BUDGET:g})"
    )
    given = parser.parse_args(words)
    given.parts = [name.strip() for name in given.parts.split(",") if name.strip()]
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown or not given.parts:
        parser.error(f"no part {', '.join(unknown) or 'named'}; there are {', '.join(PARTS)}")
    if given.device == "cuda" and not _has_cuda():
        parser.error("torch sees no CUDA device here; --device cpu --tiny is the dry run")
    return given


def as_table(document: dict[str, Any]) -> str:
    """The table, or why there is none: the run goes on, and the JSON has everything."""
    try:
        return markdown(document)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"The table could not be made of gpu.json:\n\n{traceback.format_exc()}"


def replace(file: Path, text: str) -> None:
    """Put the text into the file, whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    beside.replace(file)


def _has_cuda() -> bool:
    """Asked in a process of its own, so that this one never holds the device."""
    words = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(words, timeout=120, check=False).returncode == 0


_told: dict[str, str] = {}


def _tell(results: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each part that began or ended."""
    for name, result in results.items():
        status = str(result["status"])
        if status not in (_told.get(name), "not run"):
            _told[name] = status
            print(f"{name}: {status}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
