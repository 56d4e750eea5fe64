"""Claim: reading a file ten times as large needs at most 100 MB more memory.

Writes a jsonl and a txt file of each size, and reads each through `llmctl.data.readers.documents` in a process of
its own, which reports the largest resident memory it ever had. Prints MiB by format and size, and how
much more the largest file needs than the smallest. The files need as much free disk as the largest size:

    python benchmarks/reader_memory.py
    python benchmarks/reader_memory.py --sizes 2 20 --formats jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from timing import interleaved, line, options, ratio, report, summary

MB = 10**6
PARAGRAPH = "".join(
    f"Sentence {number} says a little, and ends with a café and a 三条街.\n" for number in range(40)
)


def write(path: Path, size: int) -> None:
    """A file of about `size` bytes; a jsonl has one paragraph a line, a txt all of them."""
    text = PARAGRAPH if path.suffix == ".txt" else json.dumps({"text": PARAGRAPH}, ensure_ascii=False) + "\n"
    raw = text.encode()
    block = raw * (MB // len(raw) + 1)
    with open(path, "wb") as file:
        for _ in range(max(1, round(size / len(block)))):
            file.write(block)


def read(path: Path) -> None:
    """In the process of its own: read everything, print peak memory in bytes, characters and seconds."""
    from llmctl.data.document import Account
    from llmctl.data.readers import documents

    started = time.perf_counter()
    characters = sum(len(document.text) for document in documents([path], "text", Account()))
    spent = time.perf_counter() - started
    print(json.dumps({"peak": peak_bytes(), "characters": characters, "seconds": spent}))


def peak_bytes() -> int:
    """The largest resident memory of this process.

    Linux keeps it by address space; `ru_maxrss`, used elsewhere, may hold the parent's from before it
    became this program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(found.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reader(path: Path) -> Callable[[], float]:
    """Peak MiB of a fresh process that reads the file."""

    def run() -> float:
        words = [sys.executable, __file__, "--read", str(path)]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        found = json.loads(out)
        print(f"{path.name}: {path.stat().st_size / MB / found['seconds']:.0f} MB/s", flush=True)
        return found["peak"] / 2**20

    return run


def measure(kind: str, sizes: list[int], rounds: int, folder: Path) -> dict[str, object]:
    """Peak memory for one format at every size."""
    paths = {f"{size} MB": folder / f"{size}.{kind}" for size in sizes}
    for path, size in zip(paths.values(), sizes, strict=True):
        write(path, size * MB)
    peaks = interleaved({name: reader(path) for name, path in paths.items()}, rounds)
    for path in paths.values():
        path.unlink()
    small, large = peaks[f"{min(sizes)} MB"], peaks[f"{max(sizes)} MB"]
    growth = summary([b - a for a, b in zip(small, large, strict=True)])
    for name, values in peaks.items():
        print(line(f"{kind} {name}", summary(values), unit="MiB"))
    print(line(f"{kind} growth", growth, unit="MiB"))
    return {"peak_MiB": {name: summary(values) for name, values in peaks.items()}, "growth_MiB": growth,
            "largest/smallest": ratio(large, small)}  # fmt: skip


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 2000], metavar="MB")
    parser.add_argument("--formats", nargs="+", default=["jsonl", "txt"], choices=["jsonl", "txt"])
    parser.add_argument("--folder", help="where to write the files (default: the system's temporary folder)")
    parser.add_argument("--read", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        read(given.read)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = {kind: measure(kind, given.sizes, given.rounds, Path(folder)) for kind in given.formats}
    report({"sizes_MB": given.sizes, "rounds": given.rounds, **found})


if __name__ == "__main__":
    main()
