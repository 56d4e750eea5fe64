"""The plan of a quickstart on a user's own data: files, rows, sizes, settings, and whether it may go on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation
from llmctl.data.sources import resolve
from llmctl.errors import UserError
from llmctl.files import combined_hash, disk_errors, file_hash, read_json, write_json
from llmctl.plan.size import total_parameters
from llmctl.recipe.tune import PairData, SftData
from llmctl.runs import RUNS
from llmctl.stages import own_plan
from llmctl.stages.own_data import (
    hold_out,
    read_answers,
    read_preferences,
    refuse_few,
    warnings,
    write_rows,
)
from llmctl.stages.own_measure import seconds_per_token
from llmctl.stages.own_plan import Settings, Sizes
from llmctl.stages.pairs import pair_rows
from llmctl.stages.quickstart import PLAN
from llmctl.stages.rows import read_rows
from llmctl.stages.text import parent
from llmctl.stages.tune import Base, prepare_base
from llmctl.talk import SILENT, Talk

DATA = "data"  # the folder of the split rows
PAIR_ROLES = ("chosen", "rejected")


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


def inputs_of(wish: Wish) -> dict[str, Any]:
    """What must be the same when it is run again: hashes of model and data, and the settings asked for."""

    def content(sources: list[str]) -> str | None:
        if not sources:
            return None
        files = resolve(sources, "records")
        hashes = [item if isinstance(item, str) else file_hash(item) for item in files]
        return combined_hash({f"{number:06}": value for number, value in enumerate(hashes)})

    return {
        "--model": identity(wish.model),
        "--data": content(wish.data),
        "--pairs": content(wish.pairs),
        "--eval": content(wish.eval),
        "--columns": wish.columns,
        "--minutes": wish.minutes,
        "--seed": wish.seed,
    }


def identity(model: str) -> str:
    """A model by its content; by its name on the hub if it lies there."""
    return parent("model", model)["hash"] or model


def known_plan(folder: Path, inputs: Mapping[str, Any]) -> Prepared | None:
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


def keep_plan(made: Prepared, inputs: Mapping[str, Any], aside: Path, folder: Path) -> Prepared:
    """Write a plan and the rows that were split off into the folder."""
    found = moved(made, aside, folder)
    with disk_errors(folder):
        if (aside / DATA).is_dir():
            shutil.copytree(aside / DATA, folder / DATA, dirs_exist_ok=True)
    write_json(folder / PLAN, {"format": 1, "inputs": inputs, "plan": asdict(found)})
    return found


def moved(made: Prepared, aside: Path, folder: Path) -> Prepared:
    """A plan whose files lie in the folder."""

    def there(files: list[str]) -> list[str]:
        return [
            str(folder / Path(f).relative_to(aside)) if Path(f).is_relative_to(aside) else f for f in files
        ]

    return replace(made, train=there(made.train), held=there(made.held))


def prepare(wish: Wish, aside: Path, talk: Talk) -> Prepared:
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
        parameters=total_parameters(base.config.spec),
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
