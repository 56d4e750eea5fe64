"""Going on with a run: what must be the same, and what --resume-with takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmctl import runs
from llmctl.errors import UserError
from llmctl.runs import Run, folder_hash
from tests.test_runs import RECIPE, manifest, started


def test_an_edited_recipe_is_listed_and_taken_only_when_asked(tmp_path: Path) -> None:
    """The folder's recipe.yaml is what --resume reads, so the manifest holds what the run began with."""
    path = started(tmp_path / "r")
    (path / "recipe.yaml").write_text("damaged: [")  # what it says counts for nothing here
    edited = RECIPE.replace("seed: 1", "seed: 2\n  learning_rate: 0.5")
    with pytest.raises(UserError) as caught:
        Run.start("pretrain", path, edited, resume=True)
    assert caught.value.message == (
        f"{path}: train.learning_rate was None when the run began, and is 0.5 now; train.seed was 1, and is 2"
    )
    with Run.start("pretrain", path, edited, resume=True, resume_with=True):
        pass
    (change,) = manifest(path)["recipe_changes"]
    assert change["step"] == 0 and change["time"]
    assert change["fields"] == {
        "train.learning_rate": {"was": None, "is": 0.5},
        "train.seed": {"was": 1, "is": 2},
    }
    with pytest.raises(UserError, match=r"train\.seed was 2, and is 1"):
        Run.start("pretrain", path, RECIPE, resume=True)
    with Run.start("pretrain", path, edited, resume=True) as run:
        run.finish({})
    assert len(manifest(path)["recipe_changes"]) == 1
    with pytest.raises(UserError) as caught:
        runs.finished_metrics("pretrain", path, RECIPE, resume_with=True)
    assert caught.value.hint == "the run is done, so its recipe stands; start a new run with another --out"


def test_resume_with_does_not_take_another_model(tmp_path: Path) -> None:
    path = started(tmp_path / "r")
    other = RECIPE + "model:\n  hidden_size: 8\n"
    with pytest.raises(UserError) as caught:
        Run.start("pretrain", path, other.replace("seed: 1", "seed: 2"), resume=True, resume_with=True)
    assert caught.value.message == f"{path}: model.hidden_size was None when the run began, and is 8 now"
    assert caught.value.hint == "this makes another model; start a new run with another --out"


def test_a_recipe_edited_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = started(tmp_path / "r")
    file = path / "run.json"
    file.write_text(file.read_text().replace('"train.seed": 1', '"train.seed": 2'))
    with pytest.raises(UserError, match="the recipe in it is not the one the run began with"):
        Run.start("pretrain", path, RECIPE.replace("seed: 1", "seed: 2"), resume=True)


def test_data_is_taken_with_a_new_recipe_but_a_parent_is_not(tmp_path: Path) -> None:
    def about(data: str, model: str) -> dict[str, Any]:
        return {
            "data": {"train": {"fingerprint": data}},
            "parents": [{"role": "model", "path": "m", "hash": model}],
        }

    path = tmp_path / "r"
    with Run.start("sft", path, RECIPE, **about("a", "1")):
        pass
    with pytest.raises(UserError, match="the train data is not what it was"):
        Run.start("sft", path, RECIPE, resume=True, **about("b", "1"))
    with pytest.raises(UserError, match="the model is not what it was"):
        Run.start("sft", path, RECIPE, resume=True, resume_with=True, **about("a", "2"))
    with Run.start("sft", path, RECIPE, resume=True, resume_with=True, **about("b", "1")):
        pass
    assert manifest(path)["recipe_changes"][0]["fields"] == {"train data": {"was": "a", "is": "b"}}


def test_a_base_that_was_renamed_is_the_same_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_text("weights")
    parents = [{"role": "model", "path": str(base), "hash": folder_hash(base)}]
    recipe = f"stage: sft\nbase: {base}\n"
    with Run.start("sft", tmp_path / "r", recipe, parents=parents):
        pass
    base.rename(tmp_path / "other")
    moved = recipe.replace(str(base), str(tmp_path / "other"))
    with Run.start("sft", tmp_path / "r", moved, resume=True, parents=parents):
        pass
    (tmp_path / "third").mkdir()
    third = recipe.replace(str(base), str(tmp_path / "third"))
    with pytest.raises(UserError, match=r"base was '.*other' when the run began, and is '.*third' now"):
        Run.start("sft", tmp_path / "r", third, resume=True, parents=parents)
