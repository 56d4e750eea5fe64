"""The recipes that come with llmctl are found by name, from a checkout and from an installation."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.errors import UserError
from llmctl.recipe import shipped


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(shipped.shipped_recipes()))
    assert shipped.find_recipe(name) == shipped.shipped_recipes()[name]
    (tmp_path / name).write_text("stage: eval")
    assert shipped.find_recipe(name) == Path(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pretrain-5mm", "did you mean `pretrain-5m`?"), ("xyz", "see `llmctl recipe list`")],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        shipped.find_recipe(name)
    assert (caught.value.message, caught.value.hint) == (f"{name}: no such recipe", hint)


def test_an_installation_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "_recipes"
    monkeypatch.setattr(shipped, "FOLDERS", (installed, tmp_path / "recipes"))
    with pytest.raises(UserError) as caught:
        shipped.recipe_folder()
    assert (caught.value.message, caught.value.hint) == (
        "the shipped recipes are missing",
        "reinstall llmctl",
    )
    installed.mkdir()
    (installed / "b.yaml").touch()
    (installed / "a.yaml").touch()
    assert list(shipped.shipped_recipes()) == ["a", "b"]
