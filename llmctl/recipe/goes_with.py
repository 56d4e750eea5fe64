"""What a variant needs and what it does not go with: both are found by asking the recipe check."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError

from llmctl.recipe.model import ModelSection
from llmctl.recipe.variants import AXES
from llmctl.recipe.yaml import parse_yaml

_LAYERS = {"pattern", "mixer"}  # both are said by model.pattern


def needs(axis: str, name: str) -> list[str]:
    """The words besides its own without which the check refuses a variant; a family's are one way of many."""
    if axis == "family":
        return []
    variant = AXES[axis].variants[name]
    own = {AXES[axis].field, f"model.{name}"}
    others = [word for word in variant.words if word.partition("=")[0] not in own]
    return [word for word in others if not _fits(settings([w for w in variant.words if w != word]))]


def needs_in_words(axis: str, name: str) -> str:
    """`needs` for people: sizes by name, choices with their value, without `model.`."""
    chosen = {AXES[other].field for other, _ in _needed(axis, name)}
    words = [(word.partition("=")[0], word) for word in needs(axis, name)]
    return ", ".join((word if field in chosen else field).removeprefix("model.") for field, word in words)


def refused(axis: str, name: str) -> dict[str, list[str]]:
    """Axis -> the variants there that the check refuses beside this one.

    What follows from the needs of either is left out.
    """
    found: dict[str, list[str]] = {}
    for other, names in _own_clashes(axis, name).items():
        for there in names:
            if axis == "options" or name in _own_clashes(other, there).get(axis, ()):
                found.setdefault(other, []).append(there)
    return found


def refused_in_words(axis: str, name: str) -> str:
    """`refused` for people: `position other than rope; ffn none`."""
    parts = []
    for other, names in refused(axis, name).items():
        left = [there for there in AXES[other].variants if there not in names]
        if not left:
            parts.append(f"any {other}")
        elif len(names) > 1 and len(left) == 1:
            parts.append(f"{other} other than {left[0]}")
        else:
            parts.append(f"{other} {', '.join(names)}")
    return "; ".join(parts)


def settings(words: list[str]) -> dict[str, Any]:
    """`model.ssm.head_dim=16` … as the nested mapping that a recipe file holds under `model`."""
    values: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        *above, last = key.split(".")[1:]
        section = values
        for part in above:
            section = section.setdefault(part, {})
        section[last] = parse_yaml(text, word)
    return values


def _own_clashes(axis: str, name: str) -> dict[str, list[str]]:
    """`_clashes` without what its needs say: other variants of an axis where it needs a certain one, and the
    clashes of that one."""
    found = _clashes(axis, name)
    for other, there in _needed(axis, name):
        said = _LAYERS if other in _LAYERS else {other}
        theirs = _clashes(other, there)
        left = {a: [n for n in names if n not in theirs.get(a, ())] for a, names in found.items()}
        found = {a: names for a, names in left.items() if names and a not in said}
    return found


@cache
def _clashes(axis: str, name: str) -> dict[str, list[str]]:
    """Axis -> the variants there whose words the check refuses together with this one's, whichever come last."""
    here = settings(AXES[axis].variants[name].words)
    found: dict[str, list[str]] = {}
    for other, there in _others(axis):
        theirs = settings(AXES[other].variants[there].words)
        if not (_fits(_merged(here, theirs)) and _fits(_merged(theirs, here))):
            found.setdefault(other, []).append(there)
    return found


def _others(axis: str) -> Iterator[tuple[str, str]]:
    """The variants that one of `axis` can meet in a model: a layer is of one kind, and families and options are none."""
    beside = {axis, "family", "options"} | (_LAYERS if axis in _LAYERS else set())
    for other in AXES if axis != "family" else ():
        if other not in beside:
            yield from ((other, there) for there in AXES[other].variants)


def _needed(axis: str, name: str) -> list[tuple[str, str]]:
    """The variants of other axes that are among the needs of one."""
    words = {word.replace("[", "").replace("]", "") for word in needs(axis, name)}
    return [(other, there) for other, there in _others(axis) if f"{AXES[other].field}={there}" in words]


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, the second where they differ."""
    found = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _fits(values: dict[str, Any]) -> bool:
    try:
        ModelSection.model_validate(values)
    except ValidationError:
        return False
    return True
