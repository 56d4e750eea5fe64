"""The closed world end to end: what pretraining knows, fine-tuning can say, and preferences can order.

Half of the people are held out: their facts are met in pretraining only, so a right answer about them is
knowledge of the base, reached by a skill that was learned on others. The quickstart runs once, as it ships;
its controls start from what it left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmctl.data import tinyworld
from llmctl.stages import quickstart
from llmctl.talk import SILENT
from tests.program import Program

HELD_OUT = "builtin:tinyworld-instructions-heldout"
MEMORY = 4e9  # bytes, of the quickstart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the quickstart returns; its folder is `world["out"]`."""
    home = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.chdir(home)
        found = quickstart.run(str(home / "quick"), None, None, SILENT)
    yield found | {"out": home / "quick", "rows": {row["stage"]: row for row in found["rows"]}}


def test_the_lifecycle_keeps_what_it_learned(world: dict[str, Any]) -> None:
    rows, exact = world["rows"], {name: row["exact_match"] for name, row in world["rows"].items()}
    assert exact["pretrain"] <= 0.10 and exact["sft"] >= 0.90
    for name, bound in {"dpo": 0.02, "merge": 0.02, "int8": 0.02, "gptq4": 0.05}.items():
        # against the SFT model as well, so that small losses cannot add up
        assert abs(rows[name]["change"]) <= bound, (name, rows[name])
        assert abs(exact[name] - exact["sft"]) <= bound, (name, exact)
    for name in ("reward", "dpo"):
        assert rows[name]["preference_accuracy_low"] >= 0.90, (name, rows[name])
    assert rows["gptq4"]["size_bytes"] < rows["int8"]["size_bytes"] < rows["merge"]["size_bytes"]
    assert world["exchange"]["answer"] == world["exchange"]["expected"]
    assert world["peak_memory_bytes"] < MEMORY


def test_short_cuts_are_at_chance() -> None:
    """What a scorer of length, or of words without their order, would get on the pairs above: nothing."""
    for pair in tinyworld.preferences("heldout"):
        assert len(pair["chosen"]) == len(pair["rejected"])
        assert sorted(pair["chosen"].split()) == sorted(pair["rejected"].split())


def test_without_pretraining_the_skill_is_worth_nothing(
    world: dict[str, Any], here: Path, llmctl: Program
) -> None:
    """The control: the same adapters, and all weights, on a model that was never pretrained."""
    random = ["--max-steps", "1", "train.learning_rate=1e-9", "train.threads=1"]
    words = ["--recipe", "quickstart-pretrain", "--tokenizer", str(world["out"] / "tokenizer")]
    done(llmctl, "pretrain", *words, "--out", "blank", *random)
    full = ["--full", "train.learning_rate=1e-3", "lora.target_modules=all-linear"]
    for name, more in {"control": [], "control-full": full}.items():
        done(llmctl, "sft", "blank", "--recipe", "sft-tinyworld", "--out", name, *more)
        found = done(llmctl, "eval", name, "--data", HELD_OUT, "--answers")
        assert found["records"] >= 500 and found["exact_match"] <= 0.15, name


def test_flipped_preferences_are_learned_too(world: dict[str, Any], here: Path, llmctl: Program) -> None:
    file = here / "flipped.jsonl"
    pairs = tinyworld.preferences("train")
    rows = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--recipe", "dpo-tinyworld", "--out", "against", "--data", str(file)]
    assert done(llmctl, "dpo", str(world["out"] / "sft"), *words)["metrics"]["eval_accuracy"] <= 0.10


def test_an_adapter_of_pretrained_weights_is_merged(
    world: dict[str, Any], here: Path, llmctl: Program
) -> None:
    words = ["--data", HELD_OUT, "--out", "merged"]
    merged = done(llmctl, "merge", str(world["out"] / "sft"), *words)["metrics"]
    assert merged["top1"] >= 0.995 and merged["effect"] > 1


def done(llmctl: Program, *words: str) -> dict[str, Any]:
    """Run a command that must succeed; its JSON."""
    outcome = llmctl(*words, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)
