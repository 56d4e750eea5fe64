"""`llmctl quickstart --model M --data FILE`: the lifecycle on a user's own model and data.

    DIR/  data/train.jsonl  data/heldout.jsonl   the rows, where none were named to evaluate on
          sft/ dpo/ merge/ int8/                 run folders; dpo/ only where there are pairs
          plan.json                              what it was made from, and the settings that were chosen
          quickstart.json                        what was measured of each

The same call again goes on: finished steps are kept, an interrupted training is resumed, and the settings stay as they
were chosen. A model that its own check refuses is kept in its folder, but what would be made from it is left out.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmctl.errors import CheckFailed, Interrupted, UserError
from llmctl.files import disk_errors
from llmctl.kernels.device import pick_device
from llmctl.locate import locate
from llmctl.lock import LOCK, Lock
from llmctl.model.checkpoint import FILES
from llmctl.recipe.load import load_recipe
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.recipe.tune import DpoRecipe, MergeRecipe, SftRecipe
from llmctl.runs import MANIFEST, read_manifest
from llmctl.stages import dpo, merge, own_plan, quantize, sft
from llmctl.stages.lifecycle import Step
from llmctl.stages.own_measure import measure
from llmctl.stages.own_prepare import (
    DATA,
    Prepared,
    Wish,
    identity,
    inputs_of,
    keep_plan,
    known_plan,
    moved,
    prepare,
)
from llmctl.stages.quickstart import PLAN, RECORD, Numbered, Record, clear_unfinished, is_stale, make
from llmctl.talk import Talk

__all__ = ["Wish", "run"]

BASE = "base"  # the row of the model before
RECEIPT = {
    "merge": ("effect", "kl", "allowed_kl", "top1", "decided_top1"),
    "int8": (
        *("size_bytes_before", "size_bytes", "perplexity_before", "perplexity", "kl", "top1"),
        *("tokens_per_second_before", "tokens_per_second"),
    ),
}
ShowCommand = Callable[[str, Mapping[str, Any]], str]


def run(wish: Wish, show: ShowCommand, talk: Talk, dry_run: bool = False) -> dict[str, Any]:
    """Every step, and what was measured before and after.

    Args:
        show: a stage and its fields -> the command line that does the same.
        dry_run: only say the plan.

    Returns:
        rows: one a model with stage, seconds, measuring and the figures of `measure`.
        receipts: what merging and quantizing measured of themselves; refused: step -> why its check refused it.
        seconds, peak_memory_bytes, model: as of the quickstart on built-in data; model is the last one that is good.
        exchange: a held-out question with the right answer, that of the base and that of the model.
        commands: step -> its command line. Of a dry run there are only these, and `plan`.

    Raises UserError: as the stages do; too few rows, inputs that changed, a folder of something else.
    """
    pick_device(wish.device or "auto")
    locate(wish.model, FILES)
    folder = wish.folder
    _refuse_foreign(folder)
    inputs = inputs_of(wish)
    if dry_run:
        return _dry_run(wish, inputs, show, talk)
    known = known_plan(folder, inputs)
    with tempfile.TemporaryDirectory(prefix="llmctl-") as aside:
        # errors in the data should show before a folder is made
        made = prepare(wish, Path(aside), talk) if known is None else known
        lock = _locked(folder)
        try:
            plan = keep_plan(made, inputs, Path(aside), folder) if known is None else known
            for line in [*plan.said, *plan.warned]:
                talk.say(line)
            return _Work(wish, plan, show, talk).run()
        finally:
            lock.release()


def _locked(folder: Path) -> Lock:
    lock = Lock(folder)
    lock.acquire()
    for left in folder.glob(".tmp-*"):  # a killed stage's, and nobody else is writing now
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return lock


def _dry_run(wish: Wish, inputs: Mapping[str, Any], show: ShowCommand, talk: Talk) -> dict[str, Any]:
    """The plan, without a trace on the disk."""
    with tempfile.TemporaryDirectory(prefix="llmctl-") as aside:
        known = known_plan(wish.folder, inputs) or moved(
            prepare(wish, Path(aside), talk), Path(aside), wish.folder
        )
    for line in [*known.said, *known.warned]:
        talk.say(line)
    steps = steps_of(wish, known)
    commands = {name: show(step.stage, _flags(wish, name, step)) for name, step in steps.items()}
    return {"plan": asdict(known), "commands": commands}


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError for a folder that is neither empty nor of such a quickstart."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but --out names a folder", "choose another name")
    with disk_errors(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    strange = sorted(name for name in names - {LOCK, DATA} if not name.startswith("."))
    if strange and PLAN not in names:
        raise UserError(f"{folder}: the folder holds something else ({strange[0]})", "choose another --out")


# --- the steps ---------------------------------------------------------------------------------------


def steps_of(wish: Wish, plan: Prepared) -> dict[str, Step]:
    """The steps by the name of their folder, in order."""
    compared = {"compare.data": plan.held, "compare.columns": plan.columns or None, **own_plan.PROOF}
    overlong = {"data.overlong": "drop" if plan.overlong else None}
    answers = {"data.train": plan.train, "data.eval": plan.held, "data.columns": plan.columns or None}
    pairs = {"data.train": wish.pairs, "data.columns": wish.pair_columns or None}
    lora = {"method": "lora"}
    found = {
        "sft": Step(
            sft.run,
            SftRecipe,
            fields={"base": wish.model, **lora, **answers, **plan.settings.sft(), **overlong},
            trains=True,
        )
    }
    if wish.pairs:
        fields = {**lora, **pairs, **plan.settings.dpo(), **overlong}
        found["dpo"] = Step(
            dpo.run, DpoRecipe, fields=fields, made_from="sft", trains=True, accuracy="eval_accuracy"
        )
    # merging folds all adapters; that the last one does little is said in the receipt, and loses nothing
    effect = {"compare.min_effect": 0 if wish.pairs else None}
    found["merge"] = Step(merge.run, MergeRecipe, fields=compared | effect, made_from=[*found][-1])
    calibrated = {"quantize.method": "int8", "quantize.calibration": plan.train}
    found["int8"] = Step(quantize.run, QuantizeRecipe, fields=calibrated | compared, made_from="merge")
    return found


def _flags(wish: Wish, name: str, step: Step) -> dict[str, Any]:
    """The fields of a step that are set."""
    flags = step.flags(name, wish.folder, wish.seed, wish.device)
    return {key: value for key, value in flags.items() if value is not None}


class _Work:
    """One call: does the steps and collects what was measured."""

    def __init__(self, wish: Wish, plan: Prepared, show: ShowCommand, talk: Talk) -> None:
        self.wish, self.plan, self.show, self.talk = wish, plan, show, talk
        self.folder, self.steps = wish.folder, steps_of(wish, plan)
        self.record = Record.read(self.folder / RECORD)
        self.refused: dict[str, str] = {}
        self.commands: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Everything; see `run`."""
        count = 1 + len(self.steps)
        talk = Numbered(self.talk, 1, count, BASE)
        self.talk.say(f"step 1 of {count}: {BASE}, what the model can do before")
        self._measure(BASE, self.wish.model, identity(self.wish.model), 0.0, {}, talk)
        done = [BASE]
        for number, (name, step) in enumerate(self.steps.items(), 2):
            if step.made_from in self.refused:
                self.talk.say(f"step {number} of {count}: {name} is left out: {step.made_from} was refused")
                self.refused[name] = f"not made: {step.made_from} was refused"
                continue
            self.talk.say(f"step {number} of {count}: {name}")
            self._step(name, step, Numbered(self.talk, number, count, name))
            done += [] if name in self.refused else [name]
        rows = [{"stage": name, **self.record.rows[name]} for name in done]
        told = {"prompt": self.plan.question, "expected": self.plan.expected}
        told |= {"before": rows[0].get("said"), "answer": rows[-1].get("said")}
        return {
            "rows": [{key: row[key] for key in row if key not in ("hash", "said")} for row in rows],
            "receipts": {name: self._receipt(name) for name in RECEIPT if name in done},
            "refused": self.refused,
            "seconds": sum(row["seconds"] + row["measuring"] for row in rows),
            "peak_memory_bytes": self.record.peak,
            "model": str(self.folder / done[-1]) if len(done) > 1 else self.wish.model,
            "exchange": told,
            "commands": self.commands,
        }

    def _step(self, name: str, step: Step, talk: Talk) -> None:
        """Make a step, or keep it, and measure it unless that was done. A refusal is noted and ends it."""
        out, flags = self.folder / name, _flags(self.wish, name, step)
        self.commands[name] = self.show(step.stage, flags)
        talk.say(f"$ {self.commands[name]}")
        recipe = load_recipe(step.kind, None, flags, [])
        try:
            self._refuse_again(step, out)
            seconds, metrics = self._made(name, step, recipe, talk)
        except CheckFailed as error:
            if step.trains:  # nothing was made that could be gone on with
                raise
            talk.say(f"refused: {error.message}")
            self.refused[name] = error.message
            return
        figures = {}
        if step.accuracy is not None and step.accuracy in metrics:
            figures = {
                f"preference_accuracy{end}": metrics[f"{step.accuracy}{end}"] for end in ("", "_low", "_high")
            }
        self._measure(name, str(out), read_manifest(out)["hash"], seconds, figures, talk)

    def _refuse_again(self, step: Step, out: Path) -> None:
        """Raise CheckFailed for a result that was refused before and was made from the same."""
        manifest = read_manifest(out) if (out / MANIFEST).is_file() else {}
        if manifest.get("status") == "refused" and not is_stale(step, out, manifest):
            raise CheckFailed(f"{out}: its own check refused it: {'; '.join(manifest['refused'])}")

    def _made(self, name: str, step: Step, recipe: Any, talk: Talk) -> tuple[float, dict[str, Any]]:
        """Seconds of work, of earlier calls included, and the metrics."""
        out, record, started = self.folder / name, self.record, time.perf_counter()
        done_before = clear_unfinished(step, out, talk)
        try:
            result = make(step, out, recipe, done_before, talk)
        except Interrupted as error:
            raise Interrupted(error.message, "run the same command again to go on") from None
        finally:
            if not done_before:
                record.spent[name] = record.spent.get(name, 0.0) + time.perf_counter() - started
                record.write()
        # what a killed process spent is known only to the training itself
        return max(record.spent.get(name, 0.0), result.metrics.get("seconds", 0.0)), result.metrics

    def _measure(
        self, name: str, where: str, content: str, seconds: float, figures: Mapping[str, Any], talk: Talk
    ) -> None:
        if self.record.rows.get(name, {}).get("hash") == content:
            return
        asked = {"base": where, "eval.data": self.plan.held, "eval.answers": True}
        talk.say(f"$ {self.show('eval', asked | {'eval.columns': self.plan.columns or None})}")
        started = time.perf_counter()
        measured = measure(where, self.plan.held, self.plan.columns, self.wish.device, talk)
        times = {"seconds": seconds, "measuring": time.perf_counter() - started}
        self.record.rows[name] = measured | figures | times | {"hash": content}
        self.record.write()

    def _receipt(self, name: str) -> dict[str, Any]:
        metrics = read_manifest(self.folder / name)["metrics"]
        figures = {key: metrics[key] for key in RECEIPT[name] if key in metrics}
        return {"of": self.steps[name].made_from, **figures}
