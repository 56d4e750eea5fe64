"""`llmctl quickstart`: the whole lifecycle on built-in data, in minutes, without a network.

    DIR/  tokenizer/ pretrain/ sft/ reward/ dpo/ merge/ int8/ gptq4/   run folders, see `lifecycle.py`
          quickstart.json   what was measured of each

The folder is safe to use again: a stage that is done is kept as long as what it was made from is the same,
a training that was interrupted goes on, and anything else that was begun is begun anew.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.data import tinyworld
from llmctl.errors import Interrupted, UserError
from llmctl.files import disk_errors, read_json, write_json
from llmctl.kernels.device import pick_device
from llmctl.lock import LOCK, Lock
from llmctl.recipe.chat import ChatRecipe
from llmctl.recipe.load import load_recipe
from llmctl.runs import MANIFEST, RUNS, RunResult, check_out, read_manifest
from llmctl.stages import chat
from llmctl.stages.lifecycle import STEPS, Step, changed, measured
from llmctl.talk import SILENT, Bar, Talk

RECORD = "quickstart.json"
PLAN = "plan.json"  # of a quickstart on a user's own data, see `own.py`


def run(out: str | None, seed: int | None, device: str | None, talk: Talk) -> dict[str, Any]:
    """Every stage of `STEPS`, and an exchange with the last model.

    Returns:
        rows: one a stage with stage, seconds, measuring (seconds too) and the figures of `measured` and
            `changed`, without `matches`.
        seconds: of all rows; peak_memory_bytes: the most this process, or one before it, had in memory.
        model: the folder of the last model; exchange: a held-out question, its answer, and what is true.

    Raises UserError: as the stages do; a file, or a folder of something else, at `out`.
    """
    folder = Path(out) if out else RUNS / "quickstart"
    pick_device(device or "auto")  # a device that is not there should show before any work
    _refuse_foreign(folder)
    recipes = {name: step.recipe(name, folder, seed, device) for name, step in STEPS.items()}
    lock = Lock(folder)
    lock.acquire()
    try:
        for left in folder.glob(".tmp-*"):  # a killed stage's, and nobody else is writing now
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        record = Record.read(folder / RECORD)
        for number, name in enumerate(STEPS, 1):
            talk.say(f"step {number} of {len(STEPS)}: {name}")
            _do(name, folder / name, recipes[name], record, device, Numbered(talk, number, len(STEPS), name))
    finally:
        lock.release()
    model = folder / list(STEPS)[-1]
    rows = [{"stage": name, **record.rows[name]} for name in STEPS]
    return {
        "rows": [
            {key: value for key, value in row.items() if key not in ("hash", "matches")} for row in rows
        ],
        "seconds": sum(row["seconds"] + row["measuring"] for row in rows),
        "peak_memory_bytes": record.peak,
        "model": str(model),
        "exchange": _exchange(conversation(str(model), seed, device)),
    }


def conversation(model: str, seed: int | None, device: str | None) -> ChatRecipe:
    """The recipe of a conversation with the last model: what it thinks likeliest, to one question at a time."""
    flags: dict[str, Any] = {"base": model, "device": device, "chat.seed": seed}
    flags |= {"chat.temperature": 0.0, "chat.history": False}  # it was trained on single questions
    return load_recipe(ChatRecipe, None, flags, [])


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError for a folder that is neither empty nor a quickstart's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but --out names a folder", "choose another name")
    with disk_errors(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if PLAN in names:
        raise UserError(f"{folder}: holds a quickstart on data of one's own", "choose another --out")
    strange = sorted(name for name in names - {*STEPS, LOCK} if not name.startswith(".tmp-"))
    if strange and RECORD not in names:
        raise UserError(f"{folder}: the folder holds something else ({strange[0]})", "choose another --out")


@dataclass
class Record:
    """What is known of the steps so far; written after each.

    Attributes:
        rows: by step, its figures, and the hash of the run they are of.
        spent: by step, seconds of work, interrupted work included.
        peak: bytes of memory.
    """

    file: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    peak: int = 0

    @classmethod
    def read(cls, file: Path) -> Record:
        """What the file holds, or nothing yet."""
        if not file.is_file():
            return cls(file)
        found = read_json(file)
        return cls(file, found.get("rows", {}), found.get("spent", {}), found.get("peak", 0))

    def write(self) -> None:
        """Into the file, with this process's memory."""
        self.peak = max(self.peak, _peak_memory())
        write_json(self.file, {"rows": self.rows, "spent": self.spent, "peak": self.peak})


def _do(name: str, out: Path, recipe: Any, record: Record, device: str | None, talk: Talk) -> None:
    """Make a step, or keep it, and measure it unless that was done."""
    step, started = STEPS[name], time.perf_counter()
    done_before = clear_unfinished(step, out, talk)
    try:
        result = make(step, out, recipe, done_before, talk)
    except Interrupted as error:
        raise Interrupted(error.message, "run the same command again to go on") from None
    finally:
        if not done_before:
            record.spent[name] = record.spent.get(name, 0.0) + time.perf_counter() - started
            record.write()
    identity = read_manifest(out)["hash"]
    if record.rows.get(name, {}).get("hash") == identity:
        return
    # what a killed process spent is known only to the training itself
    seconds = max(record.spent.get(name, 0.0), result.metrics.get("seconds", 0.0))
    started = time.perf_counter()
    record.rows[name] = measured(step, result, device, talk) | {"hash": identity}
    record.rows[name] |= changed(STEPS, record.rows, name)
    record.rows[name] |= {"seconds": seconds, "measuring": time.perf_counter() - started}
    record.write()


def make(step: Step, out: Path, recipe: Any, done_before: bool, talk: Talk) -> RunResult:
    """The result of a step: kept if it was done before, resumed if it trains, else made."""
    if step.trains:
        return step.run(recipe, talk, resume=out.exists())  # the stage knows a finished run, and whose it is
    if done_before:
        talk.say(f"{out}: done before; kept")
        return RunResult(out, read_manifest(out)["metrics"])
    return step.run(recipe, talk)


def clear_unfinished(step: Step, out: Path, talk: Talk) -> bool:
    """Delete a run that can be neither kept nor resumed; True for one that is done and is kept.

    Raises UserError if what lies there is not a run of this step, or is in use.
    """
    if not out.exists():
        return False
    check_out(out, resume=True)
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else {"stage": step.stage}
    if manifest["stage"] != step.stage:
        raise UserError(
            f"{out}: holds a `{manifest['stage']}` run, not `{step.stage}`", "choose another --out"
        )
    stale = is_stale(step, out, manifest)
    done = manifest.get("status") == "done"
    if not stale and (done or step.trains):
        return done
    lock = Lock(out)
    lock.acquire()  # nobody may be writing there
    if stale:
        talk.say(f"{out}: was made from another {step.made_from}; making it anew")
    with disk_errors(out):
        shutil.rmtree(out)
    return False


def is_stale(step: Step, out: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether what a run was made from has changed since."""
    if step.made_from is None or "parents" not in manifest:
        return False
    now = read_manifest(out.parent / step.made_from)["hash"]
    return all(parent["hash"] != now for parent in manifest["parents"])


def _exchange(recipe: ChatRecipe) -> dict[str, str]:
    """The first held-out question, the model's likeliest answer, and the right one."""
    asked = next(one for one in tinyworld.instructions("heldout") if not one["input"])
    said = chat.begin(recipe, SILENT).ask(asked["instruction"])
    return {"prompt": asked["instruction"], "answer": said.text, "expected": asked["output"]}


def _peak_memory() -> int:
    """Bytes this process has had in memory at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Numbered:
    """A talk whose bars say which step they belong to."""

    def __init__(self, talk: Talk, number: int, count: int, name: str) -> None:
        self._talk, self._before = talk, f"{number}/{count} {name}"

    def say(self, text: str) -> None:
        """One line, as it is."""
        self._talk.say(text)

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        """A bar with the step before its label."""
        return self._talk.bar(f"{self._before}: {label}", total, unit)
