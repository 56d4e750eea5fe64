"""What may differ between a run and its resumption: the recipe, field by field, and the inputs, by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import UserError

# Fields that may differ between the run and its resumption: they say where and how, not what, to compute.
# (Another device or thread count may round differently.)
FREE_ON_RESUME = (
    "out",
    "device",
    "train.threads",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "compare.threads",
    "quantize.threads",
)
# Fields whose change would make another model: no flag takes a new value of them.
FIXED_ON_RESUME = ("stage", "base", "tokenizer", "method", "model", "lora")
# Field -> the role of the parent it names, which is known by its content.
NAMES_PARENT = {"base": "model", "tokenizer": "tokenizer"}
# A field that an older llmctl did not know yet counts as one of these.
UNSET: tuple[Any, ...] = (None, False, [], {}, "auto")
SHOWN = 6  # differences that an error lists

Differences = dict[str, tuple[Any, Any]]  # field -> its value when the run began, and now


def record_of(recipe_text: str) -> dict[str, Any]:
    """What a manifest keeps of a resolved recipe: `fields`, flat by dotted name, and their `hash`."""
    fields = flat_fields(recipe_text)
    return {"hash": fields_hash(fields), "fields": fields}


def fields_hash(fields: dict[str, Any]) -> str:
    """SHA-256 of flat fields, whatever their order."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def flat_fields(recipe_text: str) -> dict[str, Any]:
    """A resolved recipe, as YAML, as dotted names and values."""
    import yaml

    values = yaml.safe_load(recipe_text)
    return _flat(values) if isinstance(values, dict) else {}


def recipe_differences(
    path: Path,
    manifest: dict[str, Any],
    recorded_text: str | None,
    recipe_text: str,
    content_of: Callable[[Path], str | None],
    free: Sequence[str] = FREE_ON_RESUME,
) -> Differences:
    """The fields in which a recipe is not the one that a run was started with.

    Args:
        recorded_text: the folder's recipe.yaml, for a run whose manifest holds no recipe; None if there is none.
        content_of: the hash of a folder; a base that lies elsewhere now, with the same content, is no difference.
        free: fields that may differ.

    Raises UserError if the manifest's copy of the recipe is not the one that was written.
    """
    import yaml

    record = manifest.get("recipe")
    new = flat_fields(recipe_text)
    if record is not None:
        old = record["fields"]
        if fields_hash(old) != record["hash"]:
            raise UserError(
                f"{path / 'run.json'}: the recipe in it is not the one the run began with",
                "the manifest was damaged or edited; start a new run with another --out",
            )
    else:
        try:
            old = flat_fields(recorded_text or recipe_text)
        except (yaml.YAMLError, RecursionError, ValueError):
            raise UserError(
                f"{path / 'recipe.yaml'}: not valid YAML", "start a new run with another --out"
            ) from None
    found = {}
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if key in free or was == now or (record is None and key not in old and now in UNSET):
            continue
        if key in NAMES_PARENT and isinstance(now, str) and _same_parent(manifest, key, now, content_of):
            continue
        found[key] = (was, now)
    return found


def _same_parent(
    manifest: dict[str, Any], field: str, where: str, content_of: Callable[[Path], str | None]
) -> bool:
    role, place = NAMES_PARENT[field], Path(where).expanduser()
    known = [one["hash"] for one in manifest.get("parents") or [] if one["role"] == role and one["hash"]]
    return bool(known) and place.is_dir() and content_of(place) == known[0]


def refuse_differences(path: Path, found: Differences, done: bool, taken: bool) -> None:
    """Raise UserError that lists the differences, unless they are `taken` and a run that goes on can take them."""
    if not found:
        return
    fixed = [key for key in found if key.split(".")[0] in FIXED_ON_RESUME]
    if taken and not done and not fixed:
        return
    listed = [(key, *found[key]) for key in (fixed if taken and not done else found)]
    (key, was, now), *rest = listed[:SHOWN]
    words = [f"{key} was {was!r} when the run began, and is {now!r} now"]
    words += [f"{key} was {was!r}, and is {now!r}" for key, was, now in rest]
    if len(listed) > SHOWN:
        words.append(f"and {len(listed) - SHOWN} more")
    new_run = "start a new run with another --out"
    if taken and done:
        hint = f"the run is done, so its recipe stands; {new_run}"
    elif taken:
        hint = f"this makes another model; {new_run}"
    elif done or fixed:
        hint = f"resume with the same recipe, or {new_run}"
    else:
        hint = f"resume with the same recipe, add --resume-with to go on with the new values, or {new_run}"
    raise UserError(f"{path}: {'; '.join(words)}", hint)


def refuse_other_inputs(
    path: Path, manifest: dict[str, Any], fields: dict[str, Any], taken: bool = False
) -> Differences:
    """The data that is not what the run began with, where that is `taken`.

    Raises UserError where it is not, and for a parent with another content.
    """
    found: Differences = {}
    now = _inputs(fields)
    for name, was in _inputs(manifest).items():
        if now.get(name, was) == was:
            continue
        if not (taken and name.endswith(" data")):
            raise UserError(
                f"{path}: the {name} is not what it was when the run began",
                "put it back, or start a new run with another --out",
            )
        found[name] = (was, now[name])
    return found


def _inputs(entries: dict[str, Any]) -> dict[str, str]:
    """What a run is made from, by content: parents by role (a hub id by its name), data by use."""
    found = {parent["role"]: parent["hash"] or parent["path"] for parent in entries.get("parents") or []}
    uses = (entries.get("data") or {}).items()
    known = {use: about for use, about in uses if isinstance(about, dict) and "fingerprint" in about}
    return found | {f"{use} data": about["fingerprint"] for use, about in known.items()}


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        # an empty section is a value: a key that comes into it later is a difference
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
