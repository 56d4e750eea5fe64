"""Arithmetic word problems in the form of GSM8K, for docs/own-data.md: rows to train on, to measure on, and pairs.

python docs/own_data.py make FOLDER            write answers.json, heldout.json and pairs.json
python docs/own_data.py questions FILE         print the questions of a file, one a line, for `llmctl chat`
python docs/own_data.py score FILE < ANSWERS   how many of the answers that `llmctl chat --json` printed are right
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 0
TRAIN, HELD_OUT, PAIRS = 400, 60, 120
NAMES = [
    "Ada",
    "Ben",
    "Chen",
    "Dora",
    "Emil",
    "Fatima",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kemal",
    "Lena",
    "Mei",
    "Nadia",
    "Omar",
    "Petra",
]
THINGS = ["apples", "books", "coins", "pencils", "shells", "stamps", "marbles", "buttons"]
Row = dict[str, str]


def problem(dice: random.Random) -> Row:
    """One question and its worked answer, which ends with `#### NUMBER`."""
    a, b, c = (dice.randint(2, 9) for _ in range(3))
    name, other = dice.sample(NAMES, 2)
    thing = dice.choice(THINGS)
    kind = dice.randrange(5)
    if kind == 0:
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
        steps, result = [f"{a} + {b} = {a + b}"], a + b
    elif kind == 1:
        question = f"{name} had {a + b} {thing} and gave {b} of them to {other}. How many are left?"
        steps, result = [f"{a + b} - {b} = {a}"], a
    elif kind == 2:
        question = f"There are {a} boxes with {b} {thing} each. How many {thing} are there in all?"
        steps, result = [f"{a} * {b} = {a * b}"], a * b
    elif kind == 3:
        question = f"{name} shares {a * b} {thing} equally among {a} friends. How many does each friend get?"
        steps, result = [f"{a * b} / {a} = {b}"], b
    else:
        question = (
            f"{name} has {a} {thing}. {other} has {b} more than {name}, and finds {c} more. "
            f"How many {thing} does {other} have?"
        )
        steps, result = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"], a + b + c
    return {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


def problems(dice: random.Random) -> Iterator[Row]:
    """Problems without an end, no question twice."""
    asked = set()
    while True:
        row = problem(dice)
        if row["question"] not in asked:
            asked.add(row["question"])
            yield row


def pair(row: Row, dice: random.Random) -> Row:
    """The right answer of a row, and one whose last result is a little off."""
    right = number(row["answer"])
    assert right is not None
    wrong = right + dice.choice([-2, -1, 1, 2])
    lines = row["answer"].splitlines()
    rejected = [*lines[:-2], re.sub(r"= \d+$", f"= {wrong}", lines[-2]), f"#### {wrong}"]
    return {"question": row["question"], "chosen": row["answer"], "rejected": "\n".join(rejected)}


def number(answer: str) -> int | None:
    """The number an answer ends with; None if it has no `####` line."""
    found = re.search(r"#### (-?\d+)\s*$", answer)
    return int(found[1]) if found else None


def make(folder: Path) -> None:
    """Write the three files. The same on every machine."""
    dice = random.Random(SEED)  # noqa: S311
    rows = problems(dice)
    train, held = ([next(rows) for _ in range(count)] for count in (TRAIN, HELD_OUT))
    files = {"answers": train, "heldout": held, "pairs": [pair(row, dice) for row in train[:PAIRS]]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{folder / name}.json: {len(content)} rows")


def score(file: Path, said: list[str]) -> str:
    """How many answers end with the right number, and with any."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    answers = [number(json.loads(line)["text"].strip()) for line in said]
    if len(answers) != len(rows):
        sys.exit(f"{len(answers)} answers to {len(rows)} questions")
    right = sum(one == number(row["answer"]) for one, row in zip(answers, rows, strict=True))
    return f"{right} of {len(rows)} right; {sum(one is not None for one in answers)} end with a number"


def main(words: list[str]) -> None:
    """Do what the first word says."""
    match words:
        case ["make", folder]:
            make(Path(folder))
        case ["questions", file]:
            print("\n".join(row["question"] for row in json.loads(Path(file).read_text(encoding="utf-8"))))
        case ["score", file]:
            print(score(Path(file), sys.stdin.read().splitlines()))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
