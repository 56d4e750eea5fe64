"""Values and bytes that no one would write on purpose, made from the schema of the recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from llmctl.recipe.schema import RECIPES

# What Python's own writers of JSON and YAML would refuse to write; put into the text instead of a name.
RAW = {
    "@digits@": "9" * 5000,
    "@deep@": "[" * 3000 + "]" * 3000,
    "@deep-objects@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@nan@": "NaN",
    "@inf@": "1e999",
    "@half@": '"\\ud800"',
    "@twice@": '{"a": 1, "a": 2}',
}
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**300, -(2**63) - 1]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-320, 1e300, -1e300, 1.0]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "auto", "\0", "\x1b[31m", "a" * 5000, "../..", "/proc/x", "~", "*", "{}", "null", "\u2028"]
    ),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
WILD = st.one_of(
    SCALARS,
    st.sampled_from(sorted(RAW)),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(TEXTS, SCALARS, max_size=3),
    st.builds(lambda: [[]]),
    st.builds(dict),
)


def written(value: Any) -> str:
    """A value as JSON (which is YAML too), with the names of `RAW` replaced."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


# --- recipes ----------------------------------------------------------------------------------------


def leaves(stage: str) -> dict[str, list[dict[str, Any]]]:
    """Dotted field of a stage's recipe -> the schemas it may have: one, or one for each kind of a choice."""
    schema = RECIPES[stage].model_json_schema()
    found: dict[str, list[dict[str, Any]]] = {}
    for path, one in _leaves(schema, schema, ""):
        found.setdefault(path, []).append(one)
    return found


def _leaves(schema: dict[str, Any], whole: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if "$ref" in schema:
        schema = {**schema, **whole["$defs"][schema["$ref"].rpartition("/")[2]]}
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        for choice in choices:
            yield from _leaves(choice, whole, path)
    elif "properties" in schema:
        for name, inner in schema["properties"].items():
            yield from _leaves(inner, whole, f"{path}.{name}" if path else name)
    elif schema.get("type") != "null":
        yield path, schema


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field may have, its limits among them."""
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = (
        schema.get(a, schema.get(b))
        for a, b in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    match schema.get("type"):
        case "integer":
            return st.one_of(st.integers(low, high), st.sampled_from([low, high]))
        case "number":
            return st.one_of(st.floats(low, high), st.sampled_from([low, high]))
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(st.sampled_from(["full", "a.txt", "sliding", "q_proj"]), max_size=2)
    return st.sampled_from(["auto", "text", "a.txt", "runs/x"])


@st.composite
def recipes(draw: st.DrawFn, stage: str) -> tuple[dict[str, Any], list[str]]:
    """Nested values of a recipe, and the fields that were set."""
    fields = leaves(stage)
    names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=5, unique=True))
    values: dict[str, Any] = {"stage": stage}
    for name in names:
        value = draw(st.one_of(WILD, fitting(draw(st.sampled_from(fields[name])))))
        *above, last = name.split(".")
        inside = values
        for section in above:
            inside = inside.setdefault(section, {})
            if not isinstance(inside, dict):
                break
        else:
            inside[last] = value
    return values, names


# --- files ------------------------------------------------------------------------------------------


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> str:
    """JSON with up to three of its values, at any depth, swapped for others, taken out, or put in."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        inside, key = copy, None
        while isinstance(inside, dict | list) and inside and (key is None or draw(st.booleans())):
            above = inside
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
            inside = above[key]
        if key is None:
            return written(draw(WILD))
        match draw(st.sampled_from(["swap", "swap", "swap", "drop", "add"])):
            case "swap":
                above[key] = draw(WILD)
            case "drop":
                del above[key]
            case "add" if isinstance(above, dict):
                above[draw(TEXTS)] = draw(WILD)
    return written(copy)


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes cut short, flipped, doubled, taken out, or with others put in."""
    found = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        other = draw(st.integers(at, min(len(found), at + 200)))
        match draw(st.sampled_from(["cut", "flip", "flip", "out", "twice", "in"])):
            case "cut":
                del found[at:]
            case "flip" if found:
                found[at] ^= 1 << draw(st.integers(0, 7))
            case "out":
                del found[at:other]
            case "twice":
                found[at:at] = found[at:other]
            case "in":
                found[at:at] = draw(
                    st.sampled_from([b"\0", b"\xff", b"\n", b'"', b"[" * 5000, b"9" * 5000, b"\xef\xbb\xbf"])
                )
    return bytes(found)
