"""A recipe as YAML for a reader: every field, its value, and what it means as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from llmctl.recipe.base import StageRecipe
from llmctl.recipe.load import section_of
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.yaml import dump_yaml

COLUMN = 34  # where comments begin, if the value leaves room
NARROWEST = 30  # columns; a comment is not broken into less


def annotated(recipe: BaseModel, width: int | None = None, every: bool = False) -> str:
    """The recipe with its defaults written out and described; loading it gives the same recipe.

    Args:
        width: columns; comments that would go past it are continued on the next line.
        every: show the fields of sections that are unset too, as comments.
    """
    return "\n".join(_lines(recipe, 0, width, every)) + "\n"


def stage_defaults(stage: str) -> StageRecipe:
    """A stage's recipe with nothing set, and its optional sections present, so that every field shows."""
    kind = RECIPES[stage]
    fields = kind.model_fields.items()
    return kind.model_validate({n: {} for n, f in fields if f.default is None and section_of(f.annotation)})


def allowed(annotation: Any) -> str:
    """The values a field may have, for the end of its description; empty where they are no choice."""
    choices = list(dict.fromkeys(_choices(annotation)))
    fixed = len(choices) == 1 and not _free(annotation)  # `stage`, and the kind of a section
    return f" ({' | '.join(choices)}{' | …' if _free(annotation) else ''})" if choices and not fixed else ""


def _choices(annotation: Any) -> Iterator[str]:
    """The words that stand in the Literals of a type, those of lists too."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
        return
    for part in get_args(annotation):
        yield from _choices(part)


def _free(annotation: Any) -> bool:
    """Whether a type takes values besides those of its Literals."""
    if get_origin(annotation) is Literal or annotation is type(None):
        return False
    parts = get_args(annotation)
    if not parts:
        return annotation in (str, int, float)
    return any(_free(part) for part in (parts[:1] if get_origin(annotation) is Annotated else parts))


def _lines(section: BaseModel, depth: int, width: int | None, every: bool, mark: str = "") -> Iterator[str]:
    fields = type(section).model_fields
    # `stage` says how to read the rest, so it leads
    for name, field in sorted(fields.items(), key=lambda item: item[0] != "stage"):
        value = getattr(section, name)
        inside = isinstance(value, BaseModel)
        text = f"{'  ' * depth}{mark}{name}:" + ("" if inside else f" {dump_yaml(value, one_line=True)}")
        words = [f"{field.description}{allowed(field.annotation)}"] if field.description else []
        if words and width is not None and width - COLUMN >= NARROWEST:
            # the first line has less room where the value is long
            before = " " * max(len(text), COLUMN)
            found = textwrap.wrap(
                words[0], width - len("  # "), initial_indent=before, subsequent_indent=" " * COLUMN
            )
            words = [line.strip() for line in found]
        for line in words or [""]:
            yield f"{text.ljust(COLUMN)}  # {line}" if line else text
            text = ""
        kind = section_of(field.annotation) if every and value is None else None
        if inside:
            yield from _lines(value, depth + 1, width, every, mark)
        elif kind is not None:
            yield from _lines(kind(), depth + 1, width, every, "# ")
