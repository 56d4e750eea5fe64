"""The checkpoints of a run: which there are, whether they are whole, and how MODEL@STEP names one.

Knows nothing of what is in them beyond `state.json`, which is written last:

    step, tokens, seconds   how far the run had come
    files                   size of every other file
    hashes                  SHA-256 of every other file (not in runs of format 1)
    hash                    SHA-256 over all of the above
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.files import known_hash
from llmctl.manifest import CHECKPOINTS, METRICS, is_plain
from llmctl.reading import Unreadable, read_rows, read_value

STATE = "state.json"
GO_BACK = "delete that checkpoint to resume from the one before it"
NAME = re.compile(r"^step-(\d{6,})$")
CHOICE = re.compile(r"^(?P<run>.+)@(?P<which>\d+|best|last)$", re.DOTALL)
WEIGHTS = (
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
)  # what is read of one that is opened as a model
BEST = "the lowest held-out loss of those evaluated at their own step"  # what @best means


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        loss: the held-out loss that was measured at its very step; None if there was no evaluation then.
        size: bytes of its files.
    """

    path: Path
    step: int
    loss: float | None
    size: int


def seal_state(state: dict[str, Any]) -> dict[str, Any]:
    """The content of state.json with its hash."""
    return {**state, "hash": _state_hash(state)}


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises UserError if it is missing or damaged."""
    try:
        state = read_value(path / STATE)
    except (Unreadable, OSError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"{path / STATE}: {reason}", GO_BACK) from None
    numbers = isinstance(state, dict) and all(
        type(state.get(name)) in (int, float) for name in ("step", "tokens", "seconds")
    )
    named = [state.get("files"), state.get("hashes") or {}] if numbers else []
    if not numbers or not all(isinstance(one, dict) and all(map(is_plain, one)) for one in named):
        raise UserError(f"{path / STATE}: says nothing of the step", GO_BACK)
    if "hash" in state and state["hash"] != _state_hash(state):
        raise UserError(f"{path / STATE}: damaged: its content does not have its hash", GO_BACK)
    return state


def _state_hash(state: dict[str, Any]) -> str:
    content = {name: value for name, value in state.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def named_checkpoints(run: Path) -> list[Path]:
    """Every folder with a checkpoint's name, whole or not, oldest first."""
    folder = run / CHECKPOINTS
    try:
        found = [path for path in folder.iterdir() if NAME.match(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=step_of)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Half-written ones and ones with a file of another size are not among them."""
    return [path for path in named_checkpoints(run) if wrong_size(path) is None]


def wrong_size(path: Path) -> str | None:
    """What shows at a glance that a checkpoint is not whole; None if nothing does."""
    try:
        state = read_state(path)
    except UserError as error:
        return error.message
    for name, size in state["files"].items():
        file = path / str(name)
        try:
            found = file.stat().st_size
        except OSError:
            return f"{file}: is missing"
        if found != size:
            return f"{file}: has {found:,} bytes, not {size}"
    return None


def damage_in(path: Path, only: tuple[str, ...] | None = None) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written.

    Args:
        only: suffixes of the files that are read; all when None.
    """
    found = wrong_size(path)
    if found is not None:
        return found
    hashes = read_state(path).get("hashes")
    for name, digest in (hashes if isinstance(hashes, dict) else {}).items():
        file = path / str(name)
        if only is not None and file.suffix not in only:
            continue
        try:
            if known_hash(file) != digest:
                return f"{file}: damaged: its bytes are not those that were written"
        except OSError as error:
            return f"{file}: {error.strerror or error}"
        except Unreadable as error:
            return f"{file}: {error}"
    return None


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints with step, held-out loss and size, oldest first."""
    losses = held_out_losses(run)
    return [
        Checkpoint(path, step_of(path), losses.get(step_of(path)), _size(path)) for path in checkpoints(run)
    ]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def held_out_losses(run: Path) -> dict[int, float]:
    """Step -> the finite held-out loss measured there; empty where metrics.jsonl cannot be read."""
    try:
        rows = read_rows(run / METRICS, numbers=True).rows
    except Unreadable:
        return {}
    return {
        row["step"]: row["eval_loss"]
        for row in rows
        if row.get("eval_loss") is not None and math.isfinite(row["eval_loss"])
    }


def best_of(found: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest held-out loss, the first among equals; None if none has one."""
    return min((one for one in found if one.loss is not None), key=lambda one: one.loss or 0.0, default=None)


def choose_checkpoint(where: str) -> str:
    """The folder that `RUN@STEP`, `RUN@best` or `RUN@last` names; any other `where` as it is.

    A folder whose own name has such an end is itself.

    Raises UserError: no such run, or it has no such checkpoint.
    """
    match = CHOICE.match(where)
    if match is None or Path(where).expanduser().exists():
        return where
    run, which = Path(match["run"]).expanduser(), match["which"]
    if not run.is_dir():
        raise UserError(f"{run}: no such folder, so it has no checkpoint @{which}", "see `llmctl runs list`")
    found = list_checkpoints(run)
    if not found:
        raise UserError(f"{run}: has no checkpoints", f"leave out @{which} to use the model itself")
    steps = ", ".join(str(one.step) for one in found)
    if which == "last":
        return str(found[-1].path)
    if which == "best":
        best = best_of(found)
        if best is None:
            raise UserError(
                f"{run}: none of its checkpoints was evaluated at its own step, so none is the best",
                f"name a step: {steps}",
            )
        return str(best.path)
    chosen = next((one for one in found if one.step == int(which)), None)
    if chosen is None:
        raise UserError(f"{run}: has no checkpoint of step {which}", f"it has {steps}")
    return str(chosen.path)
