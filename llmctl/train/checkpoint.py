"""Checkpoints: everything needed to go on as if nothing had happened, written all or not at all.

checkpoints/step-000500/   the model's own files (Hugging Face layout)
                           optimizer.pt   AdamW's moments
                           rng.pt         random state of torch, per device
                           state.json     step, tokens seen, file sizes; written last
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from llmctl.errors import UserError
from llmctl.files import folder_atomic, read_json, write_json
from llmctl.runs import CHECKPOINTS

STATE = "state.json"
GO_BACK = "delete that checkpoint to resume from the one before it"
NAME = re.compile(r"^step-(\d{6,})$")


@dataclass
class Progress:
    """How far a run has come: optimizer steps done, trained tokens seen, seconds spent."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    run: Path, progress: Progress, optimizer: Optimizer, save_model: Callable[[Path], None], keep: int
) -> Path:
    """Write `checkpoints/step-N`, then delete all but the newest `keep`.

    Raises UserError if the disk is full or not writable; the checkpoints before it stay as they were.
    """
    path = run / CHECKPOINTS / f"step-{progress.step:06d}"
    with folder_atomic(path) as folder:
        save_model(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(_rng_state(), folder / "rng.pt")
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        write_json(folder / STATE, {**asdict(progress), "files": sizes})
    kept = checkpoints(run)[-keep:]
    for old in _named(run):
        # incomplete ones too: a process that was killed while it deleted one leaves half of it
        if old not in kept and _step(old) < _step(kept[0]):
            shutil.rmtree(old)
    return path


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Half-written and damaged ones are not among them."""
    return [path for path in _named(run) if _is_complete(path)]


def clear_unfinished(run: Path) -> None:
    """Delete what killed saves left behind; the caller holds the run's lock."""
    for left in (run / CHECKPOINTS).glob(".tmp-step-*"):
        shutil.rmtree(left)


def _named(run: Path) -> list[Path]:
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if NAME.match(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_training_state(path: Path, optimizer: Optimizer) -> Progress:
    """Restore optimizer and random state; the caller loads the weights.

    Raises UserError if the files are damaged or do not fit this model.
    """
    device = next(iter(optimizer.param_groups[0]["params"])).device
    moments = _read(path / "optimizer.pt", device)
    try:
        optimizer.load_state_dict(moments)
        load_rng(path)
    except (ValueError, LookupError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: the checkpoint does not fit this run ({said})", GO_BACK) from None
    state = read_json(path / STATE)
    counts = state.get("step"), state.get("tokens")
    seconds = state.get("seconds")
    if not all(type(one) is int and one >= 0 for one in counts) or type(seconds) not in (int, float):
        raise UserError(f"{path / STATE}: damaged: no step, tokens and seconds in it", GO_BACK)
    return Progress(*counts, float(seconds))


def load_rng(path: Path | str) -> None:
    """Restore the random state of a checkpoint. Raises UserError if the file is damaged."""
    state = _read(Path(path) / "rng.pt", "cpu")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _read(file: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        return torch.load(file, map_location=device, weights_only=True)
    # what torch makes of other bytes than its own may be any error; its words would advise to trust the file
    except Exception as error:
        raise UserError(f"{file}: damaged", GO_BACK) from error


def _is_complete(path: Path) -> bool:
    try:
        sizes = read_json(path / STATE)["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (UserError, OSError, ValueError, KeyError, AttributeError):
        return False


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
