"""The closed world end to end: what pretraining knows, fine-tuning can say, and preferences can order.

Half of the people are held out: their facts are met in pretraining only, so a right answer about them is
knowledge of the base, reached by a skill that was learned on others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.data import tinyworld
from llmctl.evaluate.intervals import paired_interval
from llmctl.stages.quickstart import PRETRAIN_RECIPE, TOKENIZER_RECIPE
from tests.program import Program

HELD_OUT = "builtin:tinyworld-instructions-heldout"
ONE = "train.threads=1"


def done(llmctl: Program, *words: str) -> dict[str, Any]:
    """Run a command that must succeed; its JSON."""
    outcome = llmctl(*words, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def answers(llmctl: Program, model: str) -> list[bool]:
    """Which held-out questions a model answers to the letter."""
    return [bool(one) for one in done(llmctl, "eval", model, "--data", HELD_OUT, "--answers")["matches"]]


def share(matches: list[bool]) -> float:
    return sum(matches) / len(matches)


def flipped(here: Path) -> Path:
    """The training preferences with chosen and rejected exchanged."""
    file = here / "flipped.jsonl"
    pairs = tinyworld.preferences("train")
    rows = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_knowledge_skill_and_preference(here: Path, llmctl: Program) -> None:
    done(llmctl, "tokenizer", "train", "--recipe", TOKENIZER_RECIPE, "--out", "tok")
    done(llmctl, "pretrain", "--recipe", PRETRAIN_RECIPE, "--tokenizer", "tok", "--out", "base")
    assert share(answers(llmctl, "base")) <= 0.10

    done(llmctl, "sft", "base", "--recipe", "sft-tinyworld", "--out", "sft", ONE)
    skilled = answers(llmctl, "sft")
    assert len(skilled) >= 500 and share(skilled) >= 0.90

    # the control: the same adapters, and all weights, on a model that was never pretrained
    random = ["--max-steps", "1", "train.learning_rate=1e-9", ONE]
    done(llmctl, "pretrain", "--recipe", PRETRAIN_RECIPE, "--tokenizer", "tok", "--out", "blank", *random)
    for name, more in {"control": [], "control-full": ["--full", "train.learning_rate=1e-3"]}.items():
        done(llmctl, "sft", "blank", "--recipe", "sft-tinyworld", "--out", name, ONE, *more)
        assert share(answers(llmctl, name)) <= 0.15, name

    dpo = ["dpo", "sft", "--recipe", "dpo-tinyworld", ONE, "train.eval_steps=1000"]
    found = done(llmctl, *dpo, "--out", "dpo")["metrics"]
    assert found["eval_accuracy"] >= 0.90 and found["eval_shorter_wins"] <= 0.60
    change, low, high = paired_interval(skilled, answers(llmctl, "dpo"))
    assert abs(change) <= 0.02, (change, low, high)
    against = done(llmctl, *dpo, "--out", "against", "--data", str(flipped(here)))["metrics"]
    assert against["eval_accuracy"] <= 0.10

    merged = done(llmctl, "merge", "sft", "--data", HELD_OUT, "--out", "merged")["metrics"]
    assert merged["top1"] >= 0.995 and merged["effect"] > 1
