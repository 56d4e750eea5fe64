"""Checkpoints: everything needed to go on as if nothing had happened, written all or not at all.

checkpoints/step-000500/   the model's own files (Hugging Face layout)
                           optimizer.pt   AdamW's moments
                           rng.pt         random state of torch, per device
                           state.json     step, tokens seen, sizes and hashes of the files; written last
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.optim import Optimizer

from llmctl.checkpoints import (
    GO_BACK,
    STATE,
    checkpoints,
    named_checkpoints,
    read_state,
    seal_state,
    step_of,
)
from llmctl.errors import UserError
from llmctl.files import disk_errors, file_hash, folder_atomic, write_json
from llmctl.intact import newest_sound
from llmctl.manifest import CHECKPOINTS
from llmctl.talk import Talk


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        tokens: trained tokens seen.
        seconds: spent on steps alone.
        elapsed: seconds in all, with evaluation, samples and saving.
        window: sums since the last line of metrics, so that the next one covers the same steps after a resumption.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    window: dict[str, Any] = field(default_factory=dict)


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
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        sizes = {file.name: file.stat().st_size for file in files}
        hashes = {file.name: file_hash(file) for file in files}
        write_json(folder / STATE, seal_state({**asdict(progress), "files": sizes, "hashes": hashes}))
    kept = checkpoints(run)[-keep:]
    for old in named_checkpoints(run):
        # incomplete ones too: a process that was killed while it deleted one leaves half of it
        if old not in kept and step_of(old) < step_of(kept[0]):
            shutil.rmtree(old)
    return path


def resume_from(run: Path, talk: Talk) -> Path | None:
    """The newest checkpoint that is as it was written; None if there is none at all.

    Every newer one that is damaged is said, and set aside as `step-N.damaged`: the run will write that step again.

    Raises UserError if no checkpoint is whole.
    """
    found, damaged = newest_sound(run)
    for path, what in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with disk_errors(run):
            if aside.is_dir():
                shutil.rmtree(aside)
            os.replace(path, aside)
        back = "" if found is None else f"; going back to {found.name}"
        talk.say(f"warning: {what}{back} (the damaged checkpoint is now {aside.name})")
    return found


def clear_unfinished(run: Path) -> None:
    """Delete what killed saves left behind; the caller holds the run's lock."""
    for left in (run / CHECKPOINTS).glob(".tmp-step-*"):
        shutil.rmtree(left)


def load_training_state(path: Path, optimizer: Optimizer) -> Progress:
    """Restore optimizer and random state; the caller loads the weights.

    Raises UserError if the files are damaged or do not fit this model.
    """
    device = next(iter(optimizer.param_groups[0]["params"])).device
    moments = _read(path / "optimizer.pt", device)
    try:
        optimizer.load_state_dict(moments)
        load_rng(path)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path}: the checkpoint does not fit this run ({said})", GO_BACK) from None
    state = read_state(path)
    # checkpoints of version 0.1 have neither of the last two
    elapsed, window = state.get("elapsed", state["seconds"]), state.get("window", {})
    return Progress(state["step"], state["tokens"], state["seconds"], elapsed, window)


def load_rng(path: Path | str) -> None:
    """Restore the random state of a checkpoint. Raises UserError if the file is damaged."""
    state = _read(Path(path) / "rng.pt", "cpu")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _read(file: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        return torch.load(file, map_location=device, weights_only=True)
    # what torch makes of other bytes than its own; its words about them would advise to trust the file
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(f"{file}: damaged", GO_BACK) from error


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
