"""A recipe as YAML for a reader: every field, its value, and what it means as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from llmctl.recipe.base import StageRecipe
from llmctl.recipe.load import section_of
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.yaml import dump_yaml

COLUMN = 34  # where comments begin, if the value leaves room
NARROWEST = 30  # columns; a comment is not broken into less


def annotated(recipe: BaseModel, width: int | None = None) -> str:
    """The recipe with its defaults written out and described; loading it gives the same recipe.

    `width` is in columns: comments that would go past it are continued on the next line.
    """
    return "\n".join(_lines(recipe, 0, width)) + "\n"


def stage_defaults(stage: str) -> StageRecipe:
    """A stage's recipe with nothing set, and its optional sections present, so that every field shows."""
    kind = RECIPES[stage]
    fields = kind.model_fields.items()
    return kind.model_validate({n: {} for n, f in fields if f.default is None and section_of(f.annotation)})


def _lines(section: BaseModel, depth: int, width: int | None) -> Iterator[str]:
    fields = type(section).model_fields
    # `stage` says how to read the rest, so it leads
    for name, field in sorted(fields.items(), key=lambda item: item[0] != "stage"):
        value = getattr(section, name)
        inside = isinstance(value, BaseModel)
        text = f"{'  ' * depth}{name}:" + ("" if inside else f" {dump_yaml(value, one_line=True)}")
        words = [field.description] if field.description else []
        if words and width is not None and width - COLUMN >= NARROWEST:
            words = textwrap.wrap(words[0], width - COLUMN - len("  # "))
        for line in words or [""]:
            yield f"{text.ljust(COLUMN)}  # {line}" if line else text
            text = ""
        if inside:
            yield from _lines(value, depth + 1, width)
