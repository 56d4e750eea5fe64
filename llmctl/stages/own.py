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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation
from llmctl.data.sources import resolve
from llmctl.errors import CheckFailed, Interrupted, UserError
from llmctl.files import combined_hash, disk_errors, file_hash, read_json, write_json
from llmctl.kernels.device import pick_device
from llmctl.locate import locate
from llmctl.lock import LOCK, Lock
from llmctl.model.checkpoint import FILES
from llmctl.recipe.load import load_recipe
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.recipe.tune import DpoRecipe, MergeRecipe, PairData, SftData, SftRecipe
from llmctl.runs import MANIFEST, RUNS, read_manifest
from llmctl.stages import dpo, merge, own_plan, quantize, sft
from llmctl.stages.lifecycle import Step
from llmctl.stages.own_data import (
    hold_out,
    read_answers,
    read_preferences,
    refuse_few,
    warnings,
    write_rows,
)
from llmctl.stages.own_measure import measure, seconds_per_token
from llmctl.stages.own_plan import Settings, Sizes
from llmctl.stages.pairs import pair_rows
from llmctl.stages.quickstart import PLAN, RECORD, Numbered, Record, clear_unfinished, is_stale, make
from llmctl.stages.rows import read_rows
from llmctl.stages.text import parent
from llmctl.stages.tune import Base, prepare_base
from llmctl.talk import SILENT, Talk

DATA = "data"  # the folder of the split rows
BASE = "base"  # the row of the model before
PAIR_ROLES = ("chosen", "rejected")
RECEIPT = {
    "merge": ("effect", "kl", "allowed_kl", "top1", "decided_top1"),
    "int8": (
        *("size_bytes_before", "size_bytes", "perplexity_before", "perplexity", "kl", "top1"),
        *("tokens_per_second_before", "tokens_per_second"),
    ),
}
ShowCommand = Callable[[str, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        columns: role -> column, of answers and of pairs.
        minutes: bound of both trainings together.
    """

    model: str
    data: list[str]
    pairs: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    out: str | None = None
    seed: int | None = None
    device: str | None = None
    minutes: float | None = None

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        named = Path(self.model).expanduser()
        name = named.resolve().name if named.exists() else self.model.rpartition("/")[2]
        return Path(self.out).expanduser() if self.out else RUNS / f"{name}-quickstart"

    @property
    def answer_columns(self) -> dict[str, str]:
        return {role: column for role, column in self.columns.items() if role not in PAIR_ROLES}

    @property
    def pair_columns(self) -> dict[str, str]:
        """None for pairs unless their answers are named: a prompt and its response are columns of another file."""
        if not set(PAIR_ROLES) & self.columns.keys():
            return {}
        return {role: column for role, column in self.columns.items() if role != "response"}


@dataclass(frozen=True)
class Prepared:
    """The plan: files, settings, and what was found in the data; as in plan.json.

    Attributes:
        train, held: files of the rows; columns are those of both.
        question, expected: the first held-out row.
        said: lines about data and settings; warned: what makes the figures say less.
    """

    train: list[str]
    held: list[str]
    columns: dict[str, str]
    sizes: Sizes
    settings: Settings
    overlong: bool
    question: str
    expected: str
    said: list[str]
    warned: list[str]


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
    inputs = _inputs(wish)
    if dry_run:
        return _dry_run(wish, inputs, show, talk)
    known = _known(folder, inputs)
    if known is None:  # errors in the data should show before a folder is made
        with tempfile.TemporaryDirectory(prefix="llmctl-") as aside:
            made = _prepare(wish, Path(aside), talk)
            lock = _locked(folder)
            try:
                known = _keep(made, inputs, Path(aside), folder)
            finally:
                lock.release()
    for line in [*known.said, *known.warned]:
        talk.say(line)
    lock = _locked(folder)
    try:
        return _Work(wish, known, show, talk).run()
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
        known = _known(wish.folder, inputs) or _moved(
            _prepare(wish, Path(aside), talk), Path(aside), wish.folder
        )
    for line in [*known.said, *known.warned]:
        talk.say(line)
    steps = steps_of(wish, known)
    commands = {name: show(step.stage, _flags(wish, name, step)) for name, step in steps.items()}
    return {"plan": asdict(known), "commands": commands}


# --- the plan ----------------------------------------------------------------------------------------


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError for a folder that is neither empty nor of such a quickstart."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but --out names a folder", "choose another name")
    with disk_errors(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    strange = sorted(name for name in names - {LOCK, DATA} if not name.startswith("."))
    if strange and PLAN not in names:
        raise UserError(f"{folder}: the folder holds something else ({strange[0]})", "choose another --out")


def _inputs(wish: Wish) -> dict[str, Any]:
    """What must be the same when it is run again: hashes of model and data, and the settings asked for."""

    def content(sources: list[str]) -> str | None:
        if not sources:
            return None
        files = resolve(sources, "records")
        hashes = [item if isinstance(item, str) else file_hash(item) for item in files]
        return combined_hash({f"{number:06}": value for number, value in enumerate(hashes)})

    return {
        "--model": _identity(wish.model),
        "--data": content(wish.data),
        "--pairs": content(wish.pairs),
        "--eval": content(wish.eval),
        "--columns": wish.columns,
        "--minutes": wish.minutes,
        "--seed": wish.seed,
    }


def _identity(model: str) -> str:
    """A model by its content; by its name on the hub if it lies there."""
    return parent("model", model)["hash"] or model


def _known(folder: Path, inputs: Mapping[str, Any]) -> Prepared | None:
    """The plan of a folder; None if there is none. Raises UserError if it was made for something else."""
    if not (folder / PLAN).is_file():
        return None
    saved = read_json(folder / PLAN)
    for name, value in inputs.items():
        if saved["inputs"][name] != value:
            raise UserError(
                f"{folder}: {name} is not what it was when this quickstart began",
                "put it back to go on, or begin anew with another --out",
            )
    plan = dict(saved["plan"])
    plan |= {"sizes": Sizes(**plan["sizes"]), "settings": Settings(**plan["settings"])}
    return Prepared(**plan)


def _keep(made: Prepared, inputs: Mapping[str, Any], aside: Path, folder: Path) -> Prepared:
    """Write a plan and the rows that were split off into the folder."""
    found = _moved(made, aside, folder)
    with disk_errors(folder):
        if (aside / DATA).is_dir():
            shutil.copytree(aside / DATA, folder / DATA, dirs_exist_ok=True)
    write_json(folder / PLAN, {"format": 1, "inputs": inputs, "plan": asdict(found)})
    return found


def _moved(made: Prepared, aside: Path, folder: Path) -> Prepared:
    """A plan whose files lie in the folder."""

    def there(files: list[str]) -> list[str]:
        return [
            str(folder / Path(f).relative_to(aside)) if Path(f).is_relative_to(aside) else f for f in files
        ]

    return replace(made, train=there(made.train), held=there(made.held))


def _prepare(wish: Wish, aside: Path, talk: Talk) -> Prepared:
    """Read and check all data, split it, measure a step, choose the settings.

    Args:
        aside: where rows are written if some must be held out.
    """
    base = prepare_base(
        wish.model, device=wish.device or "auto", dtype="auto", template="auto", max_length=None, talk=talk
    )
    found = read_answers(wish.data, wish.answer_columns, "--data", talk)
    refuse_few(len(found), wish.data)
    columns, files = wish.answer_columns, (wish.data, wish.eval)
    if wish.eval:
        kept, held = found, read_answers(wish.eval, columns, "--eval", talk)
    else:
        kept, held = hold_out(found, wish.seed or 0)
        files = ([str(aside / DATA / "train.jsonl")], [str(aside / DATA / "heldout.jsonl")])
        (aside / DATA).mkdir()
        write_rows(Path(files[0][0]), kept)
        write_rows(Path(files[1][0]), held)
        columns = {}
    pairs = read_preferences(wish.pairs, wish.pair_columns, talk) if wish.pairs else []
    sizes, dropped = _sizes(wish, base, files, columns)
    fields = {"base": wish.model, "device": wish.device, "data.train": files[0], "data.columns": columns}
    sizes = replace(sizes, seconds_per_token=seconds_per_token(fields, talk))
    settings = own_plan.choose(sizes, wish.minutes)
    said = own_plan.lines(sizes, settings, wish.minutes)
    held_by = "--eval" if wish.eval else "the rows held out"
    warned = [f"warning: {line}" for line in warnings(kept, held, pairs, held_by)]
    if dropped:
        warned.append(
            f"warning: {dropped:,} rows or pairs are longer than the model reads ({sizes.limit:,} tokens) and are left out"
        )
    question, expected = _shown(held[0])
    return Prepared(*files, columns, sizes, settings, dropped > 0, question, expected, said, warned)


def _sizes(
    wish: Wish, base: Base, files: tuple[list[str], list[str]], columns: dict[str, str]
) -> tuple[Sizes, int]:
    """Sizes but for the speed, and how many records are too long for the model."""
    limit, dropped = base.max_length, 0
    rows, held = (
        read_rows(
            part,
            SftData(train=part, columns=columns, overlong=policy, packing=False),
            base.tokenizer,
            limit,
            SILENT,
        )
        for part, policy in zip(files, ("drop", "truncate"), strict=True)
    )
    dropped += _too_long(rows.account.counts)
    pairs, lengths = 0, [0]
    if wish.pairs:
        data = PairData(train=wish.pairs, columns=wish.pair_columns, overlong="drop")
        made, apart = pair_rows(data, base.tokenizer, limit, wish.seed or 0, SILENT)
        pairs = len(made.pairs)
        every = [*made.pairs, *(apart.pairs if apart else [])]
        lengths = [pair.longest for pair in every]
        dropped += _too_long(made.account.counts)
    found = Sizes(
        rows=rows.account.kept,
        tokens=int(rows.laid.pieces.length.sum()),
        trained_tokens=rows.laid.trained_tokens,
        longest=int(rows.laid.pieces.length.max()),
        held=held.account.kept,
        held_tokens=int(held.laid.pieces.length.sum()),
        pairs=pairs,
        pair_tokens=2 * sum(lengths),
        longest_pair=max(lengths),
        limit=limit,
        device=base.compute.device.type,
    )
    return found, dropped


def _too_long(counts: Mapping[str, int]) -> int:
    return sum(count for reason, count in counts.items() if reason.startswith("longer than"))


def _shown(example: Example) -> tuple[str, str]:
    """The first question of a row and its answer, as text."""
    shape = example.shape
    if isinstance(shape, Completion):
        return shape.prompt, shape.completion
    assert isinstance(shape, Conversation)
    asked = [str(turn.get("content", "")) for turn in shape.messages if turn["role"] == "user"]
    told = [str(turn.get("content", "")) for turn in shape.messages if turn["role"] == "assistant"]
    return asked[0] if asked else "", told[0]


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
    found["merge"] = Step(merge.run, MergeRecipe, fields=compared, made_from=[*found][-1])
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
        self._measure(BASE, self.wish.model, _identity(self.wish.model), 0.0, {}, talk)
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
        self, name: str, where: str, identity: str, seconds: float, figures: Mapping[str, Any], talk: Talk
    ) -> None:
        if self.record.rows.get(name, {}).get("hash") == identity:
            return
        asked = {"base": where, "eval.data": self.plan.held, "eval.answers": True}
        talk.say(f"$ {self.show('eval', asked | {'eval.columns': self.plan.columns or None})}")
        started = time.perf_counter()
        measured = measure(where, self.plan.held, self.plan.columns, self.wish.device, talk)
        times = {"seconds": seconds, "measuring": time.perf_counter() - started}
        self.record.rows[name] = measured | figures | times | {"hash": identity}
        self.record.write()

    def _receipt(self, name: str) -> dict[str, Any]:
        metrics = read_manifest(self.folder / name)["metrics"]
        return {key: metrics[key] for key in RECEIPT[name] if key in metrics}
