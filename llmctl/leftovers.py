"""What a run that ended without a result leaves in its folder, so that the same command can begin anew there."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmctl.files import disk_errors
from llmctl.lock import LOCK
from llmctl.manifest import MANIFEST, METRICS, RECIPE

FINAL = "final"  # the finished model, built beside the run's other files and then moved up
CARD = "README.md"
OWN = (FINAL, CARD, LOCK, MANIFEST, RECIPE, METRICS, "additional_chat_templates")
# Files whose bytes are the run's result; together they give the run its hash.
OUTPUT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def began_as_run(path: Path) -> bool:
    """Whether a folder is a run, or what is left of one that was killed before its manifest was written."""
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".tmp-")}
    return MANIFEST in names or names <= {LOCK, RECIPE}


def holds_only_a_run(path: Path) -> bool:
    """Whether a run without checkpoints may have written every file and folder in `path`."""
    return all(
        entry.name.startswith(".tmp-")
        or entry.name in OWN
        or (entry.is_file() and entry.suffix in OUTPUT_SUFFIXES)
        for entry in path.iterdir()
    )


def clear_dead(path: Path) -> None:
    """Delete all but manifest and lock; the caller holds the lock, and `holds_only_a_run`."""
    with disk_errors(path):
        for entry in path.iterdir():
            if entry.name not in (LOCK, MANIFEST):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
