"""`llmctl quickstart --model M --data FILE`: its plan, its closing table, and the chat it ends in."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from llmctl.cli.chat import converse
from llmctl.cli.options import command_line
from llmctl.cli.output import duration, print_json, print_table, size
from llmctl.cli.progress import make_talk
from llmctl.errors import CheckFailed, UsageError

HEADER = ("model", "time", "size", "loss", "exact match", "stops", "preferred")
NOTES = (
    "loss         of the held-out answers, in nats a token",
    "exact match  held-out questions answered to the letter, ± half a 95 % interval",
    "stops        answers that end by themselves, of those asked",
    "preferred    held-out pairs whose chosen answer gained more than the rejected one",
)
USAGE = "llmctl quickstart --model MODEL --data answers.json [--pairs pairs.json] [--eval heldout.json]"


def run_on_own(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """Run the quickstart on a user's own model and data, or print its plan.

    Args:
        given: the options, by the names of `own.Wish`; None where one was not given.

    Raises UsageError for options that do not go together; CheckFailed after the table if a model was refused.
    """
    _refuse_usage(given)
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.tune import SftRecipe
    from llmctl.stages import own, quickstart

    flags = {"data.columns": given.pop("columns"), "train.seed": given["seed"], "device": given["device"]}
    checked = load_recipe(SftRecipe, None, flags, [])  # refuses what no stage would take
    wish = own.Wish(columns=checked.data.columns, **{k: v for k, v in given.items() if v is not None})
    talk = make_talk()
    result = own.run(wish, command_line, talk, dry_run)
    if as_json:
        print_json(result)
    elif dry_run:
        print("\n".join(result["commands"].values()))
    else:
        talk.say("")
        show(result)
        _finish(result, wish.seed, wish.device, quickstart.conversation)
    if not dry_run:
        _refuse(result)


def _refuse_usage(given: Mapping[str, Any]) -> None:
    for name in ("model", "data"):
        if not given[name]:
            raise UsageError(f"--{name} is missing", f"write {USAGE}")
    minutes = given["minutes"]
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise UsageError(
            f"--minutes: {minutes:g} is no time to train", "give a number above 0, or leave it out"
        )


def show(result: Mapping[str, Any]) -> None:
    """The closing table, and the receipts below it."""
    rows = [cells(row) for row in result["rows"]]
    shown = len(HEADER) - (not any(row[-1] for row in rows))  # without pairs nothing is preferred
    print_table(HEADER[:shown], [row[:shown] for row in rows])
    print("", *NOTES[: len(NOTES) - len(HEADER) + shown], sep="\n")
    lines = [_receipt(name, found) for name, found in result["receipts"].items()]
    lines += [f"{name:6} refused: {why}" for name, why in result["refused"].items()]
    if lines:
        print("", *lines, sep="\n")
    took, memory = duration(result["seconds"]), size(result["peak_memory_bytes"])
    print(f"\n{took} in all, {memory} of memory at most; the model: {result['model']}\n")


def cells(row: Mapping[str, Any]) -> tuple[str | None, ...]:
    """A row of the table; None for what does not apply."""
    return (
        row["stage"],
        f"{row['seconds']:.1f} s" if row["seconds"] else None,
        size(row["size_bytes"]),
        None if row["loss"] is None else f"{row['loss']:.3f}",
        _share(row, "exact_match"),
        None if row["asked"] is None else f"{round(row['stop_rate'] * row['asked'])}/{row['asked']}",
        _share(row, "preference_accuracy"),
    )


def _share(row: Mapping[str, Any], name: str) -> str | None:
    """`93.2% ±1.5`; None where there is none."""
    if row[name] is None:
        return None
    return f"{row[name]:.1%} ±{50 * (row[f'{name}_high'] - row[f'{name}_low']):.1f}"


def _receipt(name: str, found: Mapping[str, Any]) -> str:
    """What a step measured of itself, on a line."""
    if name == "merge":
        return f"{name:6} differs from its adapter by {found['kl']:.2g} nats a token (allowed {found['allowed_kl']:.2g})"
    before, after = (size(found[key]) for key in ("size_bytes_before", "size_bytes"))
    speeds = f"{found['tokens_per_second_before']:.0f} -> {found['tokens_per_second']:.0f} tokens/s"
    return (
        f"{name:6} {before} -> {after}, KL {found['kl']:.2g}, same next token {found['top1']:.1%}, {speeds}"
    )


def _finish(result: Mapping[str, Any], seed: int | None, device: str | None, conversation: Any) -> None:
    """A chat with the model; away from a terminal a held-out question, answered before and after."""
    asked = result["exchange"]
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"Ask it, for example: {' '.join(asked['prompt'].split())}", flush=True)
        converse(conversation(result["model"], seed, device))
        return
    print(f"> {asked['prompt'].strip()}")
    for label, key in (("before", "before"), ("now", "answer"), ("right", "expected")):
        if asked[key] is not None:
            print(f"{label:7} {' '.join(asked[key].split()) or '(nothing)'}")


def _refuse(result: Mapping[str, Any]) -> None:
    """Raise CheckFailed if a step was refused."""
    for name in result["refused"]:
        raise CheckFailed(
            f"{name} was refused by its own check; what is good is {result['model']}",
            f"if the difference is acceptable: {result['commands'][name]} --accept; then run this again",
        )
