"""The command that runs the whole lifecycle: its closing table, and the chat it ends in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmctl.cli.chat import converse
from llmctl.cli.options import AsJson, flag
from llmctl.cli.output import duration, print_json, print_table, size
from llmctl.cli.own import run_on_own
from llmctl.cli.progress import make_talk

HEADER = ("stage", "time", "size", "loss", "exact match", "change", "preferred")
NOTES = (
    "loss         on held-out text (pretrain), pairs (reward), else answers, in nats",
    "exact match  held-out questions answered to the letter, ± half a 95 % interval",
    "change       of exact match, in points, from the model it was made from",
    "preferred    held-out pairs whose chosen answer scores higher",
)


def quickstart(
    out: Annotated[str | None, flag("quickstart", "out", "DIR")] = None,
    seed: Annotated[int | None, flag("quickstart", "seed", "N")] = None,
    device: Annotated[str | None, flag("quickstart", "device", "NAME")] = None,
    model: Annotated[str | None, flag("quickstart", "model", "MODEL")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="your questions and answers (may be repeated)"),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pairs", metavar="PATH", help="your preferences, for DPO (may be repeated)"),
    ] = None,
    eval_: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="PATH", help="rows to measure on; some are held out when unset"),
    ] = None,
    columns: Annotated[str | None, flag("sft", "columns", "ROLE=COLUMN,…")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", help="most minutes to spend on training")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole lifecycle on built-in data, or on your own model and data.

    Without --model and --data: tokenizer, pretraining, SFT, reward model, DPO, merge, INT8 and 4-bit GPTQ on a
    small closed world, a few minutes on two cores, without a network. With them: SFT by LoRA, DPO if there are
    --pairs, merge and INT8 of your model, with settings chosen by size, and what each did to held-out questions.
    Then a chat with the result, or one exchange where nobody sits at a terminal. Run it again to go on with what
    was interrupted.
    """
    given = {
        "model": model,
        "data": data,
        "pairs": pairs,
        "eval": eval_,
        "columns": columns,
        "minutes": minutes,
    }
    if dry_run or any(value is not None for value in given.values()):
        run_on_own(given | {"out": out, "seed": seed, "device": device}, dry_run, as_json)
        return
    from llmctl.stages import quickstart as stage

    talk = make_talk()
    result = stage.run(out, seed, device, talk)
    if as_json:
        print_json(result)
        return
    talk.say("")
    print_table(HEADER, [cells(row) for row in result["rows"]])
    print("", *NOTES, sep="\n")
    took, memory = duration(result["seconds"]), size(result["peak_memory_bytes"])
    print(f"\n{took} in all, {memory} of memory at most; the model: {result['model']}\n")
    exchange = result["exchange"]
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"Ask it about one of its people, for example: {exchange['prompt']}", flush=True)
        converse(stage.conversation(result["model"], seed, device))
    else:
        print(f"> {exchange['prompt']}\n{exchange['answer'].strip()}")


def cells(row: Mapping[str, Any]) -> tuple[str | None, ...]:
    """A row of the table; None for what does not apply."""
    return (
        row["stage"],
        f"{row['seconds']:.1f} s",
        size(row["size_bytes"]),
        None if row["loss"] is None else f"{row['loss']:.3f}",
        _share(row, "exact_match"),
        _points(row),
        _share(row, "preference_accuracy"),
    )


def _share(row: Mapping[str, Any], name: str) -> str | None:
    """`93.2% ±1.5`; None where there is none."""
    if row[name] is None:
        return None
    return f"{row[name]:.1%} ±{_half(row, name):.1f}"


def _points(row: Mapping[str, Any]) -> str | None:
    """`-0.4 ±0.8`; None where there is nothing to compare with."""
    return None if row["change"] is None else f"{100 * row['change']:+.1f} ±{_half(row, 'change'):.1f}"


def _half(row: Mapping[str, Any], name: str) -> float:
    """Half of an interval, in points."""
    return float(100 * (row[f"{name}_high"] - row[f"{name}_low"]) / 2)
