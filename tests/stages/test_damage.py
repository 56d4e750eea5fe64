"""Flipped bytes and edited recipes: named, and gone around where that is possible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmctl.runs import read_manifest
from tests.program import Program
from tests.stages.bad_input import WEIGHTS, Bad, told
from tests.stages.test_pretrain import WITH, crash, trained, weights

__all__ = ["trained"]  # a fixture


def flip(file: Path) -> None:
    """Turn one bit in the middle of a file."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.pt", "rng.pt", "config.json"])
def test_resume_from_a_damaged_checkpoint(name: str, trained: Path, llmctl: Program) -> None:
    """A flipped byte is named, and the run goes on from the checkpoint before, to the same weights."""
    expected = weights(trained)
    crash(trained)
    path = trained / "checkpoints" / "step-000012" / name
    flip(path)
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    assert outcome.code == 0
    assert (
        f"warning: out/checkpoints/step-000012/{name}: damaged: its bytes are not those that were written; going back "
        "to step-000011 (the damaged checkpoint is now step-000012.damaged)\nresuming from step 11 of 12\n"
    ) in outcome.err
    assert weights(trained) == expected
    assert sorted(file.name for file in (trained / "checkpoints").iterdir()) == [
        "step-000011",
        "step-000012",
        "step-000012.damaged",
    ]


def test_a_damaged_state_is_noticed(trained: Path, llmctl: Program) -> None:
    crash(trained)
    path = trained / "checkpoints" / "step-000012" / "state.json"
    path.write_text(path.read_text().replace('"step": 12', '"step": 11'))
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    assert f"{path.relative_to(trained.parent)}: damaged: its content does not have its hash" in outcome.err
    assert outcome.code == 0 and "resuming from step 11 of 12\n" in outcome.err


def test_resume_where_every_checkpoint_is_damaged(trained: Path, llmctl: Program) -> None:
    crash(trained)
    for step in (11, 12):
        flip(trained / "checkpoints" / f"step-{step:06d}" / "optimizer.pt")
    told(
        llmctl("pretrain", "--out", "out", "--resume"),
        Bad(
            "",
            "out/checkpoints/step-000012/optimizer.pt: damaged: its bytes are not those that were written; "
            "no checkpoint of the run is whole",
            "delete out/checkpoints to start the run afresh with the same command",
        ),
    )


def test_a_checkpoint_without_hashes_is_resumed_from(trained: Path, llmctl: Program) -> None:
    """As llmctl wrote them before: format 1 of the manifest, sizes alone."""
    expected = weights(trained)
    crash(trained)
    shutil.rmtree(trained / "checkpoints" / "step-000012")
    file = trained / "checkpoints" / "step-000011" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({k: state[k] for k in ("step", "tokens", "seconds", "files")}, indent=2))
    about = json.loads((trained / "run.json").read_text())
    del about["recipe"]
    (trained / "run.json").write_text(json.dumps(about | {"format": 1}))
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    assert outcome.code == 0 and "resuming from step 11 of 12\n" in outcome.err
    assert weights(trained) == expected


def test_an_edited_recipe_does_not_pass(trained: Path, llmctl: Program) -> None:
    crash(trained)
    shutil.rmtree(trained / "checkpoints" / "step-000012")
    file = trained / "recipe.yaml"
    file.write_text(
        file.read_text().replace("max_steps: 12", "max_steps: 13").replace("rate: 0.01", "rate: 0.02")
    )
    told(
        llmctl("pretrain", "--out", "out", "--resume"),
        Bad(
            "",
            "out: train.learning_rate was 0.01 when the run began, and is 0.02 now; train.max_steps was 12, and is 13",
            WITH,
        ),
    )
    outcome = llmctl("pretrain", "--out", "out", "--resume-with")
    assert outcome.code == 0 and "resuming from step 11 of 13\n" in outcome.err
    found = read_manifest(trained)
    (change,) = found["recipe_changes"]
    assert change["step"] == 11 and change["fields"]["train.max_steps"] == {"was": 12, "is": 13}
    assert found["metrics"]["steps"] == 13
    assert "changed at step 11" in llmctl("runs", "show", "out").out


def test_a_damaged_result_is_not_used(trained: Path, llmctl: Program) -> None:
    flip(trained / WEIGHTS)
    error = f"out/{WEIGHTS}: damaged: its bytes are not those that the run wrote"
    hint = (
        "copy the file back from where it is whole, or make the run again; "
        "without run.json the folder opens as it is"
    )
    for words in (
        "generate out Hello",
        "eval out --data data.jsonl",
        "sft out --data data.jsonl --out s",
        "pretrain out --data data.jsonl --out p",
        "quantize out --eval-data data.jsonl --out q",
    ):
        told(llmctl(*words.split()), Bad(words, error, hint))
        assert not any(Path(name).exists() for name in "spq")
    assert f"  {error}\n" in llmctl("runs", "show", "out").out
    assert f"DAMAGED: {error}" in llmctl("runs", "lineage", "out").out


def test_a_parent_that_was_edited_is_named_on_resume(stocked: Path, trained: Path, llmctl: Program) -> None:
    crash(trained)
    path = stocked / "tok/tokenizer_config.json"
    path.write_text(path.read_text().replace("{", "{ ", 1))
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    assert outcome.code == 1
    assert (
        "error: tok/tokenizer_config.json: damaged: its bytes are not those that the run wrote\n"
        in outcome.err
    )
