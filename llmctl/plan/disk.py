"""The disk a run needs, and whether it has it. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from llmctl.errors import UserError
from llmctl.figures import size
from llmctl.plan.memory import MOMENTS, WEIGHT

SMALL_FILES = 1 << 20  # bytes of config, manifest, metrics and report


def training_disk(
    trained: int, tokenizer: int, *, steps: int, save_steps: int, keep: int, best: bool = False
) -> dict[str, int]:
    """The most bytes a training has on the disk at once.

    Args:
        trained: parameters that are trained, which are saved in float32.
        tokenizer: bytes of its files, which lie in every checkpoint.
        steps, save_steps: of the run, and between checkpoints.
        keep: checkpoints that are kept; one more lies there while the oldest is not yet deleted.
        best: the weights of the lowest held-out loss are kept until the end.
    """
    saved = trained * WEIGHT + tokenizer
    checkpoint = saved + trained * MOMENTS
    count = min(keep + 1, -(-steps // save_steps))
    found = {"checkpoints": count * checkpoint, "result": saved + SMALL_FILES}
    return found | ({"best": saved} if best else {})


def free_bytes(path: Path) -> int:
    """Free bytes of the disk on which a path lies, or will lie once it is made."""
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def written(folder: Path) -> int:
    """Bytes that lie in a folder already, of a run that goes on."""
    if not folder.is_dir():
        return 0
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def refuse_small_disk(out: Path, disk: Mapping[str, int]) -> None:
    """Raise UserError if what will be written does not fit on the disk of `out`.

    Args:
        disk: bytes by part, as `training_disk` gives them; what a run that goes on has written already counts.
    """
    needed, free = sum(disk.values()), free_bytes(out)
    missing = needed - written(out)
    if missing <= free:
        return
    parts = ", ".join(f"{name} {size(count)}" for name, count in disk.items())
    fewer = "; fewer checkpoints take less: train.save_total_limit=1" if disk.get("checkpoints") else ""
    raise UserError(
        f"{out}: the run will write up to {size(needed)} ({parts}), but the disk has {size(free)} free",
        f"free some space, or choose a folder on another disk with --out{fewer}",
    )
