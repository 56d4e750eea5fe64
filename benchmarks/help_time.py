"""Claim: `llmctl --help` answers in at most 0.4 s, because no command imports what it does not use.

Wall time of fresh processes, in turn, after one of each that is not counted:

    python    an interpreter that does nothing: `python -c pass`
    help      `llmctl --help`

Prints seconds and the difference:

    python benchmarks/help_time.py --rounds 20
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from timing import interleaved, line, options, ratio, report, summary


def seconds(words: list[str]) -> float:
    """Wall time of a process. Raises CalledProcessError if it fails."""
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = options(__doc__, rounds=20)
    given = parser.parse_args()  # --threads is of no use here: nothing imports torch
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "help": [str(Path(sys.executable).with_name("llmctl")), "--help"],
    }
    for words in commands.values():
        seconds(words)
    sides = {name: (lambda words=words: seconds(words)) for name, words in commands.items()}
    took = interleaved(sides, given.rounds)
    added = summary([a - b for a, b in zip(took["help"], took["python"], strict=True)])
    for name, values in took.items():
        print(line(name, summary(values), unit="s"))
    print(line("help - python", added, unit="s"))
    found = {name: summary(values) for name, values in took.items()}
    report({"rounds": given.rounds, "seconds": found, "help - python": added,
            "help/python": ratio(took["help"], took["python"])})  # fmt: skip


if __name__ == "__main__":
    main()
