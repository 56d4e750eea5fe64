"""A model is used with the tokenizer it was made with, and nothing is accepted that is not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.program import Program
from tests.stages.conftest import TRAIN


def other_tokenizer(folder: Path) -> None:
    """Two entries of the vocabulary exchanged: every file loads, and every text means something else."""
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    words = about["model"]["vocab"]
    first, second = list(words)[20:22]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(about), encoding="utf-8")


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")


@pytest.mark.parametrize("change", [other_tokenizer, other_template])
@pytest.mark.parametrize("where", ["base", "base/checkpoints/{last}"])
@pytest.mark.parametrize(
    "words", ["generate {m} hello", "eval {m} --data data.jsonl", "pretrain {m} --data data.jsonl"]
)
def test_a_swapped_tokenizer_is_refused(
    stocked: Path, llmctl: Program, change, where: str, words: str
) -> None:
    last = sorted((stocked / "base" / "checkpoints").iterdir())[-1].name
    model = where.format(last=last)
    assert llmctl(*f"generate {model} hello generate.max_new_tokens=2".split()).code == 0
    change(stocked / model)
    ended = llmctl(*words.format(m=model).split())
    what = "tokenizer" if change is other_tokenizer else "chat template"
    assert ended.code == 1
    assert f"error: {model}: the {what} is not the one this run was made with\n" in ended.err


def test_a_base_without_a_tokenizer_goes_on_with_the_one_given(stocked: Path, llmctl: Program) -> None:
    shutil.copytree(stocked / "base", stocked / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "run.json"):
        (stocked / "bare" / file).unlink()
    ended = llmctl(
        *[
            "pretrain",
            "bare",
            "--tokenizer",
            "tok",
            "--data",
            "data.jsonl",
            "--out",
            "on",
            "train.max_steps=1",
        ]
    )
    assert ended.code == 0, ended.err


def test_a_manifest_remembers_the_tokenizer_that_a_base_lost(stocked: Path, llmctl: Program) -> None:
    other_tokenizer(stocked / "tok")
    (stocked / "base" / "tokenizer.json").unlink()
    ended = llmctl(
        *[
            "pretrain",
            "base",
            "--tokenizer",
            "tok",
            "--data",
            "data.jsonl",
            "--out",
            "on",
            "train.max_steps=1",
        ]
    )
    assert ended.code == 1
    assert "error: base: the tokenizer is not the one this run was made with\n" in ended.err


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("generate base hello out=x", "out"),
        ("eval base --data data.jsonl out=x", "out"),
        ("tokenizer train data.jsonl --out t device=cuda", "device"),
    ],
)
def test_fields_a_stage_does_not_read_are_unknown_to_it(
    stocked: Path, llmctl: Program, words: str, field: str
) -> None:
    ended = llmctl(*words.split())
    assert ended.code == 1 and f"error: command line: {field}: unknown key\n" in ended.err


def test_rows_longer_than_the_context_are_scored_and_told(stocked: Path, llmctl: Program) -> None:
    """Rotary positions go on; a table of positions would end (see test_bad_input)."""
    ended = llmctl(*["eval", "base", "--data", "data.jsonl", "eval.max_length=100"])
    assert ended.code == 0
    assert "eval.max_length is 100, beyond the model's max_position_embeddings of 64" in ended.err


def test_dropped_evaluation_records_are_told(stocked: Path, llmctl: Program) -> None:
    (stocked / "some.jsonl").write_text(
        '{"text": "a b c d"}\n{"text": " "}\n{"text": ""}\n', encoding="utf-8"
    )
    assert "read 3 documents, kept 1\n" in llmctl(*["eval", "base", "--data", "some.jsonl"]).err
    trained = llmctl(*TRAIN, "--eval-data", "some.jsonl", "--out", "r", "train.max_steps=1")
    assert "read 3 documents, kept 1\n" in trained.err, trained.err
    assert "split" in json.loads((stocked / "r" / "run.json").read_text())["data"]["train"]["cut"]


def test_the_plan_looks_at_the_evaluation_data(stocked: Path, llmctl: Program) -> None:
    ended = llmctl(*TRAIN, "--eval-data", "nosuch.txt", "--dry-run")
    assert ended.code == 1 and "error: nosuch.txt: no such file" in ended.err


def test_resume_of_a_done_run_still_checks_the_recipe(stocked: Path, llmctl: Program) -> None:
    assert llmctl(*TRAIN, "--out", "r").code == 0
    same = llmctl(*["pretrain", "--resume", "--out", "r"])
    assert same.code == 0 and "r: this run is done; nothing to resume\n" in same.err
    other = llmctl(*["pretrain", "--resume", "--out", "r", "train.seed=3"])
    assert other.code == 1 and "error: r: train.seed was 0 when the run began, and is 3 now\n" in other.err
    (stocked / "mine.yaml").write_text("stage: pretrain\n", encoding="utf-8")
    wrong = llmctl(*TRAIN, "--recipe", "mine.yaml", "--resume", "--out", "tok")
    assert wrong.code == 1 and "error: tok: holds a `tokenizer` run, not `pretrain`\n" in wrong.err
