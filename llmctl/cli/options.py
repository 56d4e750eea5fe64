"""Flags and positional words, and how they reach a recipe.

A flag is a shorthand for one recipe field and nothing else: `FLAGS` says which, its help is the
field's own description, and it has no default, so an unset flag leaves the recipe's value alone.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.errors import UsageError
from llmctl.recipe.words import WORDS

# of the stages that adapt a model
TUNE = {
    "data": "data.train",
    "eval_data": "data.eval",
    "columns": "data.columns",
    "template": "data.template",
    "out": "out",
    "device": "device",
    "dtype": "train.dtype",
    "seed": "train.seed",
    "max_steps": "train.max_steps",
    "threads": "train.threads",
}

# stage -> parameter of the command -> recipe field
FLAGS: dict[str, dict[str, str]] = {
    "quickstart": {"out": "out", "seed": "train.seed", "device": "device"},
    "tokenizer": {"kind": "kind", "vocab_size": "vocab_size", "out": "out"},
    "pretrain": {
        "tokenizer": "tokenizer",
        "data": "data.train",
        "eval_data": "data.eval",
        "out": "out",
        "device": "device",
        "dtype": "train.dtype",
        "seed": "train.seed",
        "max_steps": "train.max_steps",
        "threads": "train.threads",
    },
    "sft": TUNE,
    "reward": TUNE,
    "dpo": TUNE | {"beta": "dpo.beta"},
    "score": {
        "data": "score.data",
        "columns": "score.columns",
        "device": "device",
        "threads": "score.threads",
    },
    "merge": {
        "data": "compare.data",
        "columns": "compare.columns",
        "out": "out",
        "dtype": "dtype",
        "device": "device",
        "threads": "compare.threads",
    },
    "compare": {
        "data": "compare.data",
        "columns": "compare.columns",
        "min_top1": "compare.min_top1",
        "max_kl": "compare.max_kl",
        "device": "device",
        "threads": "compare.threads",
    },
    "convert": {
        "family": "family",
        "dtype": "dtype",
        "out": "out",
        "allow_pickle": "allow_pickle",
        "threads": "threads",
    },
    "quantize": {
        "method": "quantize.method",
        "bits": "quantize.bits",
        "group_size": "quantize.group_size",
        "calibration": "quantize.calibration",
        "eval_data": "compare.data",
        "columns": "compare.columns",
        "out": "out",
        "device": "device",
        "threads": "quantize.threads",
    },
    "generate": {
        "max_new_tokens": "generate.max_new_tokens",
        "temperature": "generate.temperature",
        "top_k": "generate.top_k",
        "top_p": "generate.top_p",
        "seed": "generate.seed",
        "ignore_eos": "generate.ignore_eos",
        "chat": "generate.chat",
        "device": "device",
        "threads": "generate.threads",
    },
    "chat": {
        "system": "chat.system",
        "max_new_tokens": "chat.max_new_tokens",
        "temperature": "chat.temperature",
        "top_k": "chat.top_k",
        "top_p": "chat.top_p",
        "seed": "chat.seed",
        "device": "device",
        "threads": "chat.threads",
    },
    "eval": {
        "data": "eval.data",
        "answers": "eval.answers",
        "columns": "eval.columns",
        "device": "device",
        "threads": "eval.threads",
    },
}


def flag(stage: str, name: str, metavar: str | None = None, *, many: bool = False) -> Any:
    """The Typer option of one entry of `FLAGS`; `many`: it may be given several times."""
    words = WORDS[FLAGS[stage][name]] + (" (may be repeated)" if many else "")
    return typer.Option(f"--{name.replace('_', '-')}", help=words, metavar=metavar, show_default=False)


def given(ctx: typer.Context, stage: str) -> dict[str, Any]:
    """Recipe field -> what its flag was set to, None where it was not given."""
    values = {field: ctx.params[name] for name, field in FLAGS[stage].items()}
    if "out" in values:
        values["out"] = out_of(ctx)
    for field in values:
        if field.rpartition(".")[2] in ("threads", "group_size"):  # `N|auto` and `N|channel` come as text
            values[field] = _number_in(values[field])
    return {
        field: list(value) or None if isinstance(value, (list, tuple)) else value
        for field, value in values.items()
    }


def out_of(ctx: typer.Context) -> str | None:
    """The folder that --out or --name gives. Raises UsageError for both, and for a name that is a path."""
    from llmctl.runs import RUNS

    out, name = ctx.params.get("out"), ctx.params.get("name")
    if name is None:
        return out
    if out is not None or any(re.match(r"out=", word) for word in ctx.params.get("words") or []):
        raise UsageError("--name and --out exclude each other", f"--name NAME is short for --out {RUNS}/NAME")
    if not name or "/" in name or name.startswith((".", "-")):
        raise UsageError(
            f"--name: `{name}` is not a plain name", f"use --out for a path; a name lies in {RUNS}/"
        )
    return str(RUNS / name)


# command of two words -> the stage whose fields it takes
STAGE_OF = {"tokenizer train": "tokenizer", "data inspect": "sft", "data stats": "sft"}


def other_name(name: str, args: list[str]) -> str | None:
    """What to write in the place of an option that is a field here, or another tool's name of one; None if unknown.

    Args:
        name: the option, as `--learning-rate`.
        args: the words after `llmctl`.
    """
    from llmctl.recipe.load import dotted_fields
    from llmctl.recipe.other_names import meant_by
    from llmctl.recipe.schema import RECIPES

    stage = STAGE_OF.get(" ".join(args[:2]), args[0] if args else "")
    if stage not in RECIPES or (meant := meant_by(name, dotted_fields(RECIPES[stage]))) is None:
        return None
    note = f" ({meant.note})" if meant.note else ""
    if meant.field == "base":
        return f"the model is the first word: llmctl {stage} MODEL"
    value = meant.value or _value_after(name, args)
    flags = {field: option for option, field in FLAGS.get(stage, {}).items()}
    if meant.field in flags:
        return f"write --{flags[meant.field].replace('_', '-')} {value or 'VALUE'}{note}"
    return f"write {meant.field}={value or 'VALUE'}{note}"


def _value_after(name: str, args: list[str]) -> str | None:
    """The value that was given to an option: `--name VALUE` or `--name=VALUE`."""
    for word, following in zip(args, [*args[1:], "-"], strict=True):
        if word.startswith(f"{name}="):
            return shlex.quote(word.partition("=")[2])
        if word == name and not following.startswith("-"):
            return shlex.quote(following)
    return None


def _number_in(text: str | None) -> int | str | None:
    """A word of digits as a number; others are left to the check of the recipe, which refuses them by name."""
    return int(text) if text is not None and re.fullmatch("[0-9]{1,9}", text) else text


# Positional words are told apart by `split_words`, so Typer shows only their names.
Words = Annotated[list[str] | None, typer.Argument(metavar="MODEL | KEY=VALUE", hidden=True)]
DataWords = Annotated[list[str] | None, typer.Argument(metavar="DATA | KEY=VALUE", hidden=True)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", hidden=True)]

RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE", help="recipe file, or the name of a shipped one")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="run folder by name: short for --out runs/NAME")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
ResumeWith = Annotated[
    bool,
    typer.Option("--resume-with", help="go on with it and take what differs from the recipe it began with"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def split_words(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Positional words in two: the plain ones, and the `key=value` ones that set recipe fields."""
    from llmctl.recipe.load import is_override

    plain = [word for word in words or [] if not is_override(word)]
    return plain, [word for word in words or [] if is_override(word)]


def one_model(plain: list[str]) -> str | None:
    """The MODEL of a command that takes at most one. Raises UsageError for more."""
    if len(plain) > 1:
        raise UsageError(
            f"unexpected argument: {plain[1]}",
            "one MODEL at most; repeat --data for each file, or quote a pattern: --data '*.txt'",
        )
    return plain[0] if plain else None


def read_ahead(*models: str | None) -> None:
    """Begin to hold the files of models against their hashes, while the stage is being imported, which takes seconds.

    What is wrong is told where the model is opened; this only reads it sooner.
    """
    from llmctl.intact import Check

    for where in models:
        if where is not None and Path(where).expanduser().is_dir():
            Check(Path(where))


def saved_recipe(out: str | None, overrides: list[str]) -> str | None:
    """The recipe a run to be resumed was started with, if its folder holds one."""
    from llmctl.runs import RECIPE

    out = next((word.partition("=")[2] for word in overrides if re.match(r"out=.", word)), out)
    if out is None or not (Path(out) / RECIPE).is_file():
        return None
    return str(Path(out) / RECIPE)
