"""run.json: what a run folder says of itself, read so that no damage to it can surprise its reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.reading import Unreadable, read_value

MANIFEST = "run.json"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CHECKPOINTS = "checkpoints"

# 1: without `recipe` (what the run computes, by which a changed recipe is noticed) and without hashes of checkpoints
FORMAT = 2


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_plain(name: str) -> bool:
    """Whether a name is that of a file directly in its folder, not a way out of it."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, str) and is_plain(name) for name, one in value.items()
    )


def _is_parents(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("role", "path", "hash"))
        for one in value
    )


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(about.get("fingerprint", ""), str) and isinstance(about.get("sources", []), list)
        for about in value.values()
        if isinstance(about, dict)
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _is_recipe(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("hash"), str) and _is_object(value.get("fields"))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


# What others rely on when they read a manifest. An entry may be missing or null.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_count, "a number"),
    **dict.fromkeys(
        ("stage", "status", "created", "updated", "finished", "hash", "error", "base_precision"),
        (_is_text, "a text"),
    ),
    **dict.fromkeys(("tokenizer", "template", "accepted", "command", "device"), (_is_text, "a text")),
    **dict.fromkeys(("metrics", "versions"), (_is_object, "an object")),
    "outputs": (_is_hashes, "an object of file names and hashes"),
    "parents": (_is_parents, "a list of objects with role, path and hash"),
    "data": (_is_data, "an object of data sets"),
    "recipe": (_is_recipe, "an object with hash and fields"),
    **dict.fromkeys(("refused", "resumed"), (_is_texts, "a list of texts")),
    "recipe_changes": (_is_objects, "a list of objects"),
    **dict.fromkeys(("never_seen", "trained_tokens", "stop_ids"), (_is_ids, "a list of token ids")),
    "vocab_size": (_is_count, "a number"),
}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises UserError if there is none, it cannot be read, an entry is not what it should be, or it was written by
    a newer llmctl.
    """
    file = path / MANIFEST
    hint = f"the manifest was damaged; where the weights are whole, the folder without {MANIFEST} opens as a model"
    try:
        manifest = read_value(file)
    except FileNotFoundError:
        if file.is_symlink():
            raise UserError(f"{file}: a link to nothing", hint) from None
        raise UserError(f"{path}: not a run folder (no {MANIFEST})", "see `llmctl runs list`") from None
    except NotADirectoryError:
        raise UserError(f"{path}: not a run folder", "see `llmctl runs list`") from None
    except Unreadable as error:
        raise UserError(f"{file}: {error}", hint) from None
    if not isinstance(manifest, dict):
        raise UserError(f"{file}: not a manifest", hint)
    for name, (fits, kind) in KINDS.items():
        if manifest.get(name) is not None and not fits(manifest[name]):
            raise UserError(f"{file}: {name} is not {kind}", hint)
    if (manifest.get("format") or 1) > FORMAT:
        raise UserError(
            f"{file}: of format {manifest['format']}, which is newer than this llmctl (format {FORMAT})",
            "update llmctl",
        )
    return manifest


def run_folder(path: Path) -> Path | None:
    """The run that a folder is, or is a checkpoint of; None if it is neither."""
    path = path.expanduser().resolve()
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    return run if has_manifest(run) else None


def run_of(path: Path) -> dict[str, Any] | None:
    """The manifest of the run that a folder is, or is a checkpoint of; None if it is neither."""
    run = run_folder(path)
    return None if run is None else read_manifest(run)


def has_manifest(path: Path) -> bool:
    """Whether a folder holds a manifest, readable or not: a loop of links or a pipe counts too."""
    file = path / MANIFEST
    try:
        file.lstat()
    except OSError:
        return False
    return True
