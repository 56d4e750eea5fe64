"""What every recipe section is: strict, and described by `words.py`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmctl.recipe.words import WORDS


class Mistake(ValueError):
    """What is wrong with a value, and what to do about it; raised by the checks of a section."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Section(BaseModel):
    """A group of fields. Unknown keys and wrong types are errors, never dropped or converted."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class StageRecipe(Section):
    """What every stage shares."""

    @property
    def stage_name(self) -> str:
        """The word after `stage:` in a recipe of this class."""
        return str(type(self).model_fields["stage"].default)


def about(path: str, default: Any = ..., **limits: Any) -> Any:
    """A field whose description is the one written in `words.py` under `path`.

    Raises KeyError if the field has no description, so none can be forgotten.
    """
    return Field(default, description=WORDS[path], **limits)
