"""The recipes that come with llmctl: found beside the package when installed, beside the source else."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import UserError, nearest

_HERE = Path(__file__).resolve().parent.parent
FOLDERS = (_HERE / "_recipes", _HERE.parent / "recipes")


def recipe_folder() -> Path:
    """The folder of shipped recipes. Raises UserError if the installation lost it."""
    for folder in FOLDERS:
        if folder.is_dir():
            return folder
    raise UserError("the shipped recipes are missing", "reinstall llmctl")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A path as given, or else the shipped recipe of that name.

    Raises UserError with the nearest shipped name if there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    close = nearest(path.stem, list(shipped))
    raise UserError(
        f"{name}: no such recipe",
        f"did you mean `{close}`?" if close else "see `llmctl recipe list`",
    )
