"""docs/own_data.py: the problems are right, the same everywhere, and scored by their last number."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parent.parent / "docs" / "own_data.py"


def script() -> ModuleType:
    """docs/own_data.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("own_data", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OWN = script()


@pytest.fixture
def made(tmp_path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of all files, by name."""
    OWN.make(tmp_path)
    return {file.stem: json.loads(file.read_text()) for file in sorted(tmp_path.iterdir())}


def test_every_step_of_every_answer_is_right(made: dict[str, list[dict[str, str]]]) -> None:
    assert {name: len(rows) for name, rows in made.items()} == {"answers": 400, "heldout": 60, "pairs": 120}
    for row in made["answers"] + made["heldout"]:
        *steps, last = row["answer"].splitlines()
        results = []
        for step in steps:
            a, sign, b, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", step).groups()  # type: ignore[union-attr]
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[
                sign
            ]
            results.append(int(result))
            assert value == int(result)
        assert last == f"#### {results[-1]}"


def test_no_question_is_held_out_and_trained_on(made: dict[str, list[dict[str, str]]]) -> None:
    asked = [{row["question"] for row in made[name]} for name in ("answers", "heldout")]
    assert len(asked[0]) == 400 and len(asked[1]) == 60 and not asked[0] & asked[1]


def test_pairs_differ_in_the_result(made: dict[str, list[dict[str, str]]]) -> None:
    for row in made["pairs"]:
        right, wrong = (OWN.number(row[name]) for name in ("chosen", "rejected"))
        assert right != wrong and f"= {wrong}\n#### {wrong}" in row["rejected"]


def test_score(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"answer": "1 + 1 = 2\n#### 2"}, {"answer": "#### 3"}, {"answer": "#### 4"}]))
    said = [json.dumps({"text": text}) for text in ("#### 2", "it is\n#### 5", "4")]
    assert OWN.score(file, said) == "1 of 3 right; 2 end with a number"
    with pytest.raises(SystemExit, match="2 answers to 3 questions"):
        OWN.score(file, said[:2])
