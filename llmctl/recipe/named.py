"""The files and folders that a recipe names: are they there?"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmctl.errors import UserError, nearest

MODELS = ("base", "other", "tokenizer")
DATA = ("data.train", "data.eval", "score.data", "compare.data", "eval.data", "quantize.calibration")
TEMPLATES = ("auto", "chatml", "alpaca")


def refuse_missing(recipe: BaseModel, file: Path) -> None:
    """Raise UserError for the first file or folder that a recipe names and that is not there.

    What may be an id of the hub, `owner/name` without such a folder here, passes, and so does `builtin:NAME`.
    """
    for field, name in _named(recipe):
        if _is_there(name) or (field != "data.template" and _may_be_on_hub(name)):
            continue
        folder = Path(name).expanduser().parent
        near = nearest(Path(name).name, [path.name for path in folder.iterdir()]) if folder.is_dir() else None
        raise UserError(
            f"{file}: {field}: {name}: no such file or folder",
            f"did you mean `{folder / near}`?" if near else "--no-files checks the recipe without them",
        )


def _named(recipe: BaseModel) -> Iterator[tuple[str, str]]:
    """(field, name) of everything a recipe names."""
    for field in MODELS:
        if name := _value(recipe, field):
            yield field, name
    for field in DATA:
        for name in _value(recipe, field) or []:
            if not name.startswith("builtin:"):
                yield field, name
    template = _value(recipe, "data.template")
    if template and template not in TEMPLATES:
        yield "data.template", template


def _value(recipe: Any, field: str) -> Any:
    for part in field.split("."):
        recipe = getattr(recipe, part, None)
    return recipe


def _is_there(name: str) -> bool:
    path = Path(name).expanduser()
    return path.exists() or (glob.has_magic(name) and bool(glob.glob(str(path), recursive=True)))


def _may_be_on_hub(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and rest and "/" not in rest.partition(":")[0]) and not (
        name.startswith((".", "~", "/"))
        or Path(owner).is_dir()
        or Path(rest).suffix in (".json", ".jsonl", ".txt")
    )
