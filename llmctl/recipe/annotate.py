"""A recipe as YAML for a reader: every field, its value, and what it means as a comment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llmctl.recipe.load import section_of
from llmctl.recipe.schema import RECIPES, StageRecipe

COLUMN = 34  # where comments begin, if the value leaves room


def annotated(recipe: BaseModel) -> str:
    """The recipe with its defaults written out and described; loading it gives the same recipe."""
    return "\n".join(_lines(recipe, 0)) + "\n"


def stage_defaults(stage: str) -> StageRecipe:
    """A stage's recipe with nothing set, and its optional sections present, so that every field shows."""
    kind = RECIPES[stage]
    fields = kind.model_fields.items()
    return kind.model_validate({n: {} for n, f in fields if f.default is None and section_of(f.annotation)})


def _lines(section: BaseModel, depth: int) -> Iterator[str]:
    fields = type(section).model_fields
    # `stage` says how to read the rest, so it leads
    for name, field in sorted(fields.items(), key=lambda item: item[0] != "stage"):
        value = getattr(section, name)
        inside = isinstance(value, BaseModel)
        text = f"{'  ' * depth}{name}:" + ("" if inside else f" {_scalar(value)}")
        yield f"{text.ljust(COLUMN)}  # {field.description}" if field.description else text
        if inside:
            yield from _lines(value, depth + 1)


def _scalar(value: Any) -> str:
    """One value on one line, as the recipe loader reads it back.

    JSON is YAML, and only words that YAML would take for something else need its quotes.
    """
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum() and value[0].isalpha():
        plain = value.lower() not in ("true", "false", "null")
        return value if plain else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
