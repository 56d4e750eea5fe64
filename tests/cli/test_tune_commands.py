"""sft, reward, dpo, score, merge, convert and compare: how words and flags reach their recipes, and what is printed."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llmctl.stages as stages
from llmctl.cli.main import COMMANDS
from llmctl.errors import CheckFailed
from llmctl.recipe.schema import RECIPES
from llmctl.runs import RunResult
from tests.program import Program

TRAINING = ("sft", "reward", "dpo")
ANSWERS = [
    {"prompt": "<|bos|>\nWho?", "reference": "Ada.", "a": "Ada.", "b": "Ada."},
    {"prompt": "x" * 200, "reference": "Bo", "a": "Bo\x1b[31m", "b": "Bob"},
]
COMPARED = {"top1": 0.5, "kl": 0.25, "tokens": 1234, "answers": ANSWERS}
SCORED = {
    "accuracy": 0.75,
    "rows": [
        {"score": 1.5, "side": "chosen", "place": "x.jsonl:1", "answer": "Ada\nlives"},
        {"score": -0.25, "place": "x.jsonl:2", "answer": "no"},
    ],
}


@dataclass
class Called:
    """What a fake stage was called with."""

    recipe: Any = None
    words: dict[str, Any] | None = None
    failed: bool = False


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """The stages of these commands replaced by fakes that only note what they were asked."""
    noted = Called()

    def stage(result: Any) -> types.SimpleNamespace:
        def run(recipe: Any, talk: Any, **words: Any) -> Any:
            noted.recipe, noted.words = recipe, words
            return json.loads(json.dumps(result)) if isinstance(result, dict) else result

        return types.SimpleNamespace(run=run)

    def drift(failed: list[str], a: str, b: str) -> None:
        if failed and noted.failed:
            raise CheckFailed(f"{b} is not {a}: {failed[0]}", "allow it")

    trained = RunResult(Path("runs/x"), {"loss": 2.5, "steps": 12345})
    found: dict[str, Any] = dict.fromkeys(TRAINING, trained)
    found |= {"score": SCORED, "merge": RunResult(Path("runs/m"), COMPARED | {"effect": 0.125})}
    found |= {"convert": RunResult(Path("runs/c"), {"family": "phi3"})}
    found |= {"compare": COMPARED | {"failed": ["too far"]}}
    for name, result in found.items():
        monkeypatch.setattr(stages, name, stage(result), raising=False)
    gate = types.SimpleNamespace(refuse_drift=drift)
    monkeypatch.setattr(stages, "gate", gate, raising=False)
    monkeypatch.setitem(sys.modules, "llmctl.stages.gate", gate)
    return noted


# --- what reaches the recipe -------------------------------------------------------------------------

COMMON = "--data a --data b --eval-data v --template chatml --out o --max-steps 5 --seed 7 --device cpu --dtype float32"
REACHED = {
    "base": "m",
    "out": "o",
    "device": "cpu",
    "data": {"train": ["a", "b"], "eval": ["v"], "template": "chatml"},
    "train": {"max_steps": 5, "seed": 7, "dtype": "float32"},
}
FIELDS: dict[str, dict[str, Any]] = {
    **{f"{stage} m {COMMON}": REACHED for stage in TRAINING},
    **{f"{stage} m --lora": {"base": "m", "method": "lora"} for stage in TRAINING},
    **{f"{stage} m --full": {"base": "m", "method": "full"} for stage in TRAINING},
    **{f"{stage} m --qlora": {"base": "m", "method": "qlora"} for stage in TRAINING},
    "sft --lora m lora.r=32 lora.target_modules=[q_proj] method=qlora": {
        "base": "m",
        "method": "qlora",
        "lora": {"r": 32, "target_modules": ["q_proj"]},
    },
    "dpo m --beta 0.3": {"base": "m", "dpo": {"beta": 0.3}},
    "score m --data a --device cpu score.batch_size=3": {
        "base": "m",
        "device": "cpu",
        "score": {"data": ["a"], "batch_size": 3},
    },
    "merge m --data a --out o --dtype bfloat16 --device cpu compare.min_effect=0.5": {
        "base": "m",
        "out": "o",
        "dtype": "bfloat16",
        "device": "cpu",
        "compare": {"data": ["a"], "min_effect": 0.5},
    },
    "convert m --family phi3 --dtype bfloat16 --out o --allow-pickle": {
        "base": "m",
        "family": "phi3",
        "dtype": "bfloat16",
        "out": "o",
        "allow_pickle": True,
    },
    "compare m n --data a --min-top1 0.5 --max-kl 2 --device cpu": {
        "base": "m",
        "other": "n",
        "device": "cpu",
        "compare": {"data": ["a"], "min_top1": 0.5, "max_kl": 2.0},
    },
    "compare m compare.answers=0 n": {"base": "m", "other": "n", "compare": {"answers": 0}},
}


@pytest.mark.parametrize("line", FIELDS)
def test_words_and_flags_reach_the_recipe(line: str, llmctl_: Program, called: Called) -> None:
    assert llmctl_(*line.split()).code == 0
    assert called.recipe == RECIPES[line.split()[0]].model_validate(FIELDS[line])


def test_unset_flags_leave_the_recipe_alone(llmctl_: Program, called: Called) -> None:
    for stage in (*TRAINING, "score", "merge", "convert", "compare"):
        words = ["m", "n"] if stage == "compare" else ["m"]
        assert llmctl_(stage, *words).code == 0
        named = dict(zip(("base", "other"), words, strict=False))
        assert called.recipe == RECIPES[stage]().model_copy(update=named), stage


@pytest.mark.parametrize("stage", TRAINING)
def test_resume_takes_the_saved_recipe(stage: str, llmctl_: Program, called: Called) -> None:
    Path("r").mkdir()
    Path("r/recipe.yaml").write_text(f"stage: {stage}\nbase: m\nmethod: full\ntrain: {{seed: 9}}\n")
    for words in (("--out", "r"), ("out=r",)):
        assert llmctl_(stage, "--resume", *words).code == 0
        found = called.recipe
        assert (found.base, found.out, found.method, found.train.seed) == ("m", "r", "full", 9)
        assert called.words is not None and called.words["resume"] is True
    llmctl_(stage, "m", "--out", "new")
    assert called.words["resume"] is False


def test_a_dry_run_of_sft(llmctl_: Program, called: Called) -> None:
    assert llmctl_("sft", "m", "--dry-run").code == 0
    assert called.words == {"resume": False, "resume_with": False, "dry_run": True}


def test_two_models_from_a_recipe(llmctl_: Program, called: Called) -> None:
    Path("c.yaml").write_text("stage: compare\nbase: one\nother: two\ncompare: {data: [x], max_kl: 3}\n")
    assert llmctl_("compare", "--recipe", "c.yaml").code == 0
    assert (called.recipe.base, called.recipe.other, called.recipe.compare.max_kl) == ("one", "two", 3)
    assert llmctl_("compare", "mine", "--recipe", "c.yaml").code == 0
    assert (called.recipe.base, called.recipe.other) == ("mine", "two")


MISSING = "name a run folder, a Hugging Face folder or a hub id"
WRONG = {
    **{f"{stage} --data x": ("missing argument MODEL", MISSING) for stage in (*TRAINING, "score", "merge")},
    **{
        f"{stage} m --resume": (
            "--resume does not say which run to go on with",
            "name its folder with --out DIR",
        )
        for stage in TRAINING
    },
    **{
        f"{stage} m --lora --full": ("--lora and --full exclude each other", "give one of them")
        for stage in TRAINING
    },
    "sft m --qlora --lora": ("--lora and --qlora exclude each other", "give one of them"),
    "dpo m --beta x": ("--beta: `x` is not a number", "see `llmctl dpo --help`"),
    "compare": ("missing arguments A and B", f"two models are compared: {MISSING}"),
    "compare m": ("missing argument B", f"two models are compared: {MISSING}"),
    "compare a b c": ("unexpected argument: c", "two models are compared: A and B"),
    "sft m --datta x": ("no such option: --datta", "did you mean `--data`?"),
    "sftt m": ("no such command: sftt", "did you mean `sft`?"),
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_lines(line: str, llmctl_: Program, called: Called) -> None:
    message, hint = WRONG[line]
    ended = llmctl_(*line.split())
    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {message}\nhint: {hint}\n")
    assert called.recipe is None, "no stage may run"


# --- what is printed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAINING)
def test_a_run_and_its_metrics(stage: str, llmctl_: Program, called: Called) -> None:
    unit = "nats per token" if stage == "sft" else "per pair"
    shown = f"run  runs/x\n  steps  12,345\n  loss   2.5 ({unit}, in training)\n"
    assert llmctl_(stage, "m").out == shown
    shown = json.loads(llmctl_(stage, "m", "--json").out)
    assert shown == {"run": "runs/x", "metrics": {"loss": 2.5, "steps": 12345}}


SIDES = [
    "",
    "prompt 1  <|bos|> Who?",
    "  both  Ada.",
    "",
    f"prompt 2  … {'x' * 120}",
    "  a     Bo [31m",
    "  b     Bob",
]


def test_a_comparison(llmctl_: Program, called: Called) -> None:
    lines = llmctl_("compare", "m", "n").out.splitlines()
    assert lines == ["top1    0.5", "kl      0.25", "tokens  1,234", *SIDES]
    assert json.loads(llmctl_("compare", "m", "n", "--json").out) == COMPARED | {"failed": ["too far"]}


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_comparison_that_fails_is_printed_all_the_same(
    words: list[str], llmctl_: Program, called: Called
) -> None:
    called.failed = True
    ended = llmctl_("compare", "m", "n", *words)
    assert ended.code == 3 and ended.out.startswith("{" if words else "top1")
    assert ended.err == "error: n is not m: too far\nhint: allow it\n"


def test_a_merge(llmctl_: Program, called: Called) -> None:
    lines = llmctl_("merge", "m").out.splitlines()
    assert lines == [
        *SIDES,
        "",
        "run  runs/m",
        "  same next token        50.00%",
        "  divergence (KL)        0.25 nats per token",
        "  adapter moves base by  0.125 nats per token",
    ]
    shown = json.loads(llmctl_("merge", "m", "--json").out)
    assert shown == {"run": "runs/m", "metrics": COMPARED | {"effect": 0.125}}


def test_scores(llmctl_: Program, called: Called) -> None:
    assert llmctl_("score", "m").out.splitlines() == [
        "  +1.5000  chosen    x.jsonl:1  Ada lives",
        "  -0.2500            x.jsonl:2  no",
        "accuracy  0.75",
    ]
    assert json.loads(llmctl_("score", "m", "--json").out) == SCORED


# --- help --------------------------------------------------------------------------------------------


def test_no_command_is_cut_in_the_list(llmctl_: Program) -> None:
    listed = llmctl_("--help").out.partition("Commands:")[2]
    assert "..." not in listed and len([line for line in listed.splitlines() if line.strip()]) == len(
        COMMANDS
    )


FLAGS = {
    "sft": "--data --eval-data --lora --qlora --full --template --out --recipe --max-steps --seed --device "
    "--dtype --resume --dry-run --json",
    "reward": "--data --eval-data --lora --qlora --full --template --out --recipe --max-steps --seed --device --dtype "
    "--resume --json",
    "dpo": "--data --eval-data --lora --qlora --full --beta --template --out --recipe --max-steps --seed --device "
    "--dtype --resume --json",
    "score": "--data --recipe --device --json",
    "merge": "--data --out --dtype --recipe --device --json",
    "convert": "--family --dtype --out --allow-pickle --recipe --json",
    "compare": "--data --min-top1 --max-kl --recipe --device --json",
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_names_every_flag_and_where_the_fields_are(command: str, llmctl_: Program) -> None:
    text = llmctl_(command, "--help").out
    for flag in FLAGS[command].split():
        assert f"  {flag} " in text, flag
    assert f"llmctl recipe show {command}" in " ".join(text.split())
