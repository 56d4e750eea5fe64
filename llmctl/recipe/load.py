"""From a recipe file, flags and `key=value` words to one checked recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmctl.errors import UserError, nearest, one_of
from llmctl.recipe.base import Mistake, StageRecipe
from llmctl.recipe.other_names import meant_by
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.shipped import find_recipe
from llmctl.recipe.yaml import dump_yaml, parse_yaml, read_yaml

R = TypeVar("R", bound=StageRecipe)
OVERRIDE = re.compile(r"^([a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)*)=(.*)$", re.DOTALL)


def load_recipe(kind: type[R], file: str | None, flags: dict[str, Any], overrides: list[str]) -> R:
    """The checked recipe of one stage.

    Args:
        kind: the recipe class of the stage.
        file: a recipe file, or the name of a shipped one; None for defaults only.
        flags: dotted field -> value; None means the flag was not given.
        overrides: `key=value` words; they win over flags, flags over the file.

    Raises:
        UserError: naming the file, the key path, and the nearest right name.
    """
    values: dict[str, Any] = {}
    source = "recipe"
    if file is not None:
        path = find_recipe(file)
        source = str(path)
        values = _read(path, kind)
    for key, value in flags.items():
        if value is not None:
            _set(values, key, value, "command line")
    words = [_split(word) for word in overrides]
    for key, value in words:
        _set(values, key, value, "command line")
    given = {key for key, _ in words} | {key for key, value in flags.items() if value is not None}
    return _check(kind, values, source if file else "command line", given)


def check_file(path: Path) -> StageRecipe:
    """Read and check a recipe file of any stage (`llmctl recipe check`)."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise _not_a_mapping(path)
    stage = values.get("stage")
    if not isinstance(stage, str) or stage not in RECIPES:
        close = nearest(str(stage), list(RECIPES))
        hint = f"did you mean `{close}`?" if close else "the first line of a recipe is `stage: NAME`"
        shown = "is missing" if stage is None else f"`{stage}` is not one of {one_of(list(RECIPES))}"
        raise UserError(f"{path}: stage: {shown}", hint)
    return _check(RECIPES[stage], values, str(path), set())


def dump_recipe(recipe: BaseModel) -> str:
    """The recipe as YAML with every default written out; loading it gives the same recipe."""
    return dump_yaml(recipe.model_dump(mode="json", exclude_none=True))


def is_override(word: str) -> bool:
    """Whether a positional word of the command line is `key=value`."""
    return OVERRIDE.match(word) is not None


def _read(path: Path, kind: type[StageRecipe]) -> dict[str, Any]:
    values = read_yaml(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise _not_a_mapping(path)
    wanted = kind.model_fields["stage"].default
    stage = values.get("stage", wanted)
    if stage != wanted:
        raise UserError(
            f"{path}: this recipe is for stage `{stage}`, not `{wanted}`", f"run `llmctl {_command(stage)}`"
        )
    return values


def _command(stage: Any) -> str:
    return "tokenizer train" if stage == "tokenizer" else str(stage)


def _not_a_mapping(path: Path) -> UserError:
    return UserError(
        f"{path}: a recipe is a mapping of keys to values", "the first line of a recipe is `stage: NAME`"
    )


def _split(word: str) -> tuple[str, Any]:
    match = OVERRIDE.match(word)
    if match is None:
        raise UserError(f"`{word}` is not of the form key=value", "for example train.max_steps=100")
    key, text = match.groups()
    return key, parse_yaml(text, f"{key}=") if text else ""


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        inner = values.setdefault(name, {})
        if inner is None:
            inner = values[name] = {}
        if not isinstance(inner, dict):
            raise UserError(
                f"{where}: {key}: `{name}` is a value, not a section", "drop one of the two settings"
            )
        values = inner
    values[last] = value


def _check(kind: type[R], values: dict[str, Any], source: str, given: set[str]) -> R:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(kind, _worst(error.errors()), source, given) from None


def _worst(errors: list[ErrorDetails]) -> ErrorDetails:
    """The error to tell first: a misspelt key explains the required one that is missing beside it."""
    return next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])


def _explain(kind: type[BaseModel], found: ErrorDetails, source: str, given: set[str]) -> UserError:
    path = [str(part) for part in found["loc"]]
    section, path = _walk(kind, path)
    key = ".".join(path)
    if any(key == word or key.startswith(f"{word}.") for word in given):
        source = "command line"
    elif source != "command line" and any(word.startswith(f"{key}.") for word in given):
        source = f"{source} and command line"
    message, hint = _said(found, section, path, [_tag(option) for option in _options(kind, path)])
    if found["type"] == "extra_forbidden" and (meant := meant_by(path[-1], dotted_fields(kind))):
        note = f" ({meant.note})" if meant.note else ""
        hint = f"did you mean `{meant.field}`?{note}"
    if hint is None:
        field = ".".join(part for part in path if not part.isdigit())
        stage = kind.model_fields["stage"].default
        hint = f"`llmctl recipe show {stage}` explains {field or 'every field'}"
    return UserError(f"{source}: {key}: {message}" if key else f"{source}: {message}", hint)


def _said(
    found: ErrorDetails, section: type[BaseModel] | None, path: list[str], kinds: list[str]
) -> tuple[str, str | None]:
    """What pydantic found, in our words, and what to do about it where that is plain.

    Args:
        section: the one that owns the last key of `path`.
        kinds: the sections that may stand at `path`, if it is a choice of them.
    """
    kind_of, value = found["type"], found["input"]
    if kind_of == "extra_forbidden":
        known = list(section.model_fields) if section else []
        below = _below(section, path[-1])
        if below is not None:
            return "unknown key", f"did you mean `{'.'.join([*path[:-1], below])}`?"
        close = nearest(path[-1], known)
        return "unknown key", f"did you mean `{close}`?" if close else f"known keys here: {', '.join(known)}"
    if kind_of in ("literal_error", "union_tag_invalid"):
        choices = [str(c) for c in _choices(found)]
        word = value if kind_of == "literal_error" else found["ctx"]["tag"]
        close = nearest(str(word), choices)
        return f"`{word}` is not one of {one_of(choices)}", f"did you mean `{close}`?" if close else None
    if kind_of == "union_tag_not_found":
        tag = found["ctx"]["discriminator"].strip("'")
        return f"{tag} is unset", f"set {'.'.join([*path, tag])} to one of {one_of(kinds)}"
    if kind_of == "missing":
        return "this key is required", None
    if kind_of in ("model_type", "model_attributes_type"):
        return f"should be a section of keys and values, not {_shown(value)}", None
    if kind_of == "value_error":
        error = found["ctx"]["error"]
        return str(error), error.hint if isinstance(error, Mistake) else None
    if kind_of == "too_short":
        return "should not be empty", None
    message = found["msg"].replace("Input should", "should")
    return f"{message[0].lower()}{message[1:]}, not {_shown(value)}", _mend(kind_of, value)


def _below(section: type[BaseModel] | None, name: str) -> str | None:
    """Where a key that `section` does not know stands in a section inside it: `routing.num_clusters`."""
    for field, about in section.model_fields.items() if section else ():
        for part in _unwrapped(about.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel) and name in part.model_fields:
                return f"{field}.{name}"
    return None


def _mend(kind_of: str, value: Any) -> str | None:
    if kind_of == "list_type":
        return f"write it as a list: [{value}]" if isinstance(value, str) else "write it as a list: [A, B]"
    if kind_of == "string_type" and isinstance(value, (int, float)):
        return f'put quotes around it: "{value}"'
    return "write true or false" if kind_of == "bool_type" else None


def _choices(found: ErrorDetails) -> list[str]:
    ctx = found["ctx"]
    text = ctx["expected"] if "expected" in ctx else ctx["expected_tags"]
    return re.findall(r"'([^']*)'", text) or re.findall(r"\d+", text)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    if value is None:
        return "nothing"
    text = str(value) if not isinstance(value, str) else f"the text `{value}`"
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(kind: type[BaseModel], path: list[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that owns the last key of `path`, and `path` without union tags."""
    section: type[BaseModel] | None = kind
    clean: list[str] = []
    for part in path:
        fields = section.model_fields if section else {}
        tags = {_tag(option): option for option in _options(kind, clean)}
        if part in tags and part not in fields:
            section = tags[part]
            continue
        clean.append(part)
        if part != path[-1] or len(clean) < len(path):
            inner = section_of(fields[part].annotation) if part in fields else None
            section = inner if inner is not None or part != path[-1] else section
    return section, clean


def dotted_fields(kind: type[BaseModel], above: str = "") -> list[str]:
    """The paths of all fields of a recipe that hold a value: `train.learning_rate`; sections of a choice are left out."""
    found: list[str] = []
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        found += [f"{above}{name}"] if inner is None else dotted_fields(inner, f"{above}{name}.")
    return found


def _tag(option: type[BaseModel]) -> str:
    for field in option.model_fields.values():
        values = get_args(field.annotation)
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
    return ""


def _options(kind: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    annotation: Any = kind
    for part in path:
        section = section_of(annotation)
        if section is None or part not in section.model_fields:
            return []
        annotation = section.model_fields[part].annotation
    return [a for a in _unwrapped(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside a type such as `ModelSection | None`; None for values and choices."""
    found = [a for a in _unwrapped(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
    return found[0] if len(found) == 1 else None


def _unwrapped(annotation: Any) -> list[Any]:
    """The plain types inside unions and Annotated."""
    inner = get_args(annotation)
    if isinstance(annotation, type) or not inner:
        return [annotation]
    return [leaf for part in inner for leaf in _unwrapped(part)]
