"""`threads` of every stage that has the field: a number is what torch computes with, and long work is watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmctl.cli.options import FLAGS
from llmctl.errors import UserError
from llmctl.kernels import threads
from llmctl.kernels.threads import Choice, Work
from llmctl.recipe.chat import ChatRecipe
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import RECIPES, EvalRecipe
from llmctl.stages import chat, explain
from tests.program import Program
from tests.said import Said
from tests.stages.conftest import SMALL

ONE_STEP = ["train.max_steps=1", "train.dtype=float32", "--out", "out"]
FEW_ROWS = ["compare.max_rows=2", "compare.answers=1", "compare.max_new_tokens=4"]
TEXT = ["--eval-data", "data.jsonl", "compare.max_length=32", "compare.speed_tokens=8", "compare.max_kl=9"]
GPTQ = ["--method", "gptq", "--calibration", "data.jsonl", "quantize.group_size=16", "compare.min_top1=0"]

# stage -> the section that has the field, the rest of a command line, what it tells of as long work
STAGES: dict[str, tuple[str, list[str], set[str]]] = {
    "pretrain": (
        "train", ["--tokenizer", "tok", "--data", "data.jsonl", *SMALL, *ONE_STEP], {"training", "evaluation", "decoding"},
    ),
    "sft": ("train", ["base", "--data", "talks.jsonl", *ONE_STEP], {"training", "evaluation", "decoding"}),
    "reward": ("train", ["base", "--data", "prefs.jsonl", *ONE_STEP], {"training"}),
    "dpo": ("train", ["base", "--data", "prefs.jsonl", *ONE_STEP], {"training", "computing the reference"}),
    "score": ("score", ["scorer", "--data", "prefs.jsonl"], {"scoring"}),
    "merge": ("compare", ["adapter", *FEW_ROWS, "compare.min_effect=0", "--out", "out"], {"evaluation", "decoding"}),
    "compare": ("compare", ["base", "base", "--data", "talks.jsonl", *FEW_ROWS], {"evaluation", "decoding"}),
    "quantize": (
        "quantize", ["base", *FEW_ROWS, *TEXT, *GPTQ, "--out", "out"], {"calibration", "evaluation"},
    ),
    "generate": ("generate", ["base", "Anna", "--ignore-eos", "--max-new-tokens", "4"], {"decoding"}),
    "eval": ("eval", ["base", "--data", "talks.jsonl", "--answers"], {"evaluation", "exact completion"}),
    "chat": ("chat", [], {"decoding"}),
    "convert": ("", ["base", "--out", "out"], set()),
}  # fmt: skip


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the work that is told of; `auto` gives one thread of two."""
    names: set[str] = set()

    class Recorder(threads._Watch):
        def add(self, work: Work, units: float, seconds: float) -> None:
            assert units > 0 and seconds > 0
            names.add(work.name)

    monkeypatch.setattr(threads, "_Watch", Recorder)
    monkeypatch.setattr(threads, "look", lambda: Choice(1, 2, "2 cores"))
    return names


@pytest.fixture
def prefs(talking: Path) -> Path:
    rows = [{"prompt": str(i), "chosen": "good", "rejected": "bad" + "!" * (i % 3)} for i in range(12)]
    (talking / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return talking


def run(stage: str, setting: str, llmctl: Program, *, flag: bool) -> None:
    section, words, _ = STAGES[stage]
    field = [f"{section}.threads={setting}".lstrip(".")]
    if stage == "chat":
        more = ["chat.max_new_tokens=4", "chat.ignore_eos=true"]
        chat.begin(load_recipe(ChatRecipe, None, {"base": "base"}, field + more), Said()).ask("Anna")
        return
    if stage == "score":
        assert llmctl("reward", *STAGES["reward"][1][:-1], "scorer", "train.threads=1").code == 0
    outcome = llmctl(stage, *words, *(["--threads", setting] if flag else field))
    assert outcome.code == 0, outcome.err


def test_every_stage_with_the_field_is_here() -> None:
    have = {
        name
        for name, kind in RECIPES.items()
        for key, field in kind.model_fields.items()
        if key == "threads" or "threads" in getattr(field.annotation, "model_fields", {})
    }
    assert have == STAGES.keys()


def test_the_flag_sets_the_field_of_every_stage() -> None:
    flags = {stage: names["threads"] for stage, names in FLAGS.items() if "threads" in names}
    assert flags == {stage: f"{section}.threads".lstrip(".") for stage, (section, *_) in STAGES.items()}


def test_a_flag_that_is_no_number_of_threads(talking: Path, llmctl: Program) -> None:
    outcome = llmctl("eval", "base", "--data", "data.jsonl", "--threads", "many")
    assert outcome.code == 1
    assert "eval.threads: `many` is neither a number of threads (1 to 1,024) nor auto" in outcome.err


@pytest.mark.parametrize("stage", STAGES)
def test_a_number_is_used_and_nothing_is_watched(
    stage: str, prefs: Path, told: set[str], llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "look", lambda: Choice(2, 2, "2 cores"))
    torch.set_num_threads(2)
    run(stage, "1", llmctl, flag=True)
    assert torch.get_num_threads() == 1 and not told


@pytest.mark.parametrize("stage", STAGES)
def test_auto_is_chosen_and_long_work_is_told_of(
    stage: str, prefs: Path, told: set[str], llmctl: Program
) -> None:
    torch.set_num_threads(2)
    run(stage, "auto", llmctl, flag=False)
    assert torch.get_num_threads() == 1
    assert told == STAGES[stage][2]


def test_explain_chooses_too(talking: Path, told: set[str]) -> None:
    torch.set_num_threads(2)
    explain.run("base", "Anna", "cpu", Said())
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("value", ["0", "-1", "1025", "2.0", "true", "all"])
@pytest.mark.parametrize("stage", ["pretrain", "chat", "quantize"])
def test_what_is_no_number_of_threads(stage: str, value: str) -> None:
    section = STAGES[stage][0]
    with pytest.raises(UserError) as caught:
        load_recipe(RECIPES[stage], None, {}, [f"{section}.threads={value}"])
    shown = {"true": "True"}.get(value, value)
    assert f"{section}.threads" in caught.value.message
    assert f"`{shown}` is neither a number of threads (1 to 1,024) nor auto" in caught.value.message


@pytest.mark.parametrize(("text", "setting"), [("null", "auto"), ("auto", "auto"), ("3", 3), ("1024", 1024)])
def test_what_is_one(text: str, setting: int | str) -> None:
    """`null` stands in recipes that were written before there was auto."""
    assert load_recipe(EvalRecipe, None, {}, [f"eval.threads={text}"]).eval.threads == setting
