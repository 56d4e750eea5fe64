"""Flags and positional words, and how they reach a recipe.

A flag is a shorthand for one recipe field and nothing else: `FLAGS` says which, its help is the
field's own description, and it has no default, so an unset flag leaves the recipe's value alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.errors import UsageError, UserError
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
}

# stage -> parameter of the command -> recipe field
FLAGS: dict[str, dict[str, str]] = {
    "quickstart": {
        "out": "out",
        "seed": "train.seed",
        "device": "device",
        "model": "base",
    },
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
    },
    "sft": TUNE,
    "reward": TUNE,
    "dpo": TUNE | {"beta": "dpo.beta"},
    "score": {"data": "score.data", "columns": "score.columns", "device": "device"},
    "merge": {
        "data": "compare.data",
        "columns": "compare.columns",
        "out": "out",
        "dtype": "dtype",
        "device": "device",
    },
    "compare": {
        "data": "compare.data",
        "columns": "compare.columns",
        "min_top1": "compare.min_top1",
        "max_kl": "compare.max_kl",
        "device": "device",
    },
    "convert": {"family": "family", "dtype": "dtype", "out": "out", "allow_pickle": "allow_pickle"},
    "quantize": {
        "method": "quantize.method",
        "bits": "quantize.bits",
        "group_size": "quantize.group_size",
        "calibration": "quantize.calibration",
        "eval_data": "compare.data",
        "columns": "compare.columns",
        "out": "out",
        "device": "device",
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
    },
    "chat": {
        "system": "chat.system",
        "max_new_tokens": "chat.max_new_tokens",
        "temperature": "chat.temperature",
        "top_k": "chat.top_k",
        "top_p": "chat.top_p",
        "seed": "chat.seed",
        "device": "device",
    },
    "eval": {
        "data": "eval.data",
        "answers": "eval.answers",
        "columns": "eval.columns",
        "device": "device",
    },
}


def flag(stage: str, name: str, metavar: str | None = None, *, many: bool = False) -> Any:
    """The Typer option of one entry of `FLAGS`; `many`: it may be given several times."""
    words = WORDS[FLAGS[stage][name]] + (" (may be repeated)" if many else "")
    return typer.Option(f"--{name.replace('_', '-')}", help=words, metavar=metavar, show_default=False)


def given(ctx: typer.Context, stage: str) -> dict[str, Any]:
    """Recipe field -> what its flag was set to, None where it was not given."""
    values = {field: ctx.params[name] for name, field in FLAGS[stage].items()}
    return {
        field: list(value) or None if isinstance(value, (list, tuple)) else value
        for field, value in values.items()
    }


def command_line(stage: str, fields: Mapping[str, Any]) -> str:
    """The command that sets these fields of a stage, as a shell takes it; None is a field that is not set."""
    flags = {field: option for option, field in FLAGS[stage].items()}
    words = ["llmctl", stage] + ([str(fields["base"])] if fields.get("base") else [])
    for field, value in fields.items():
        if value is None or field == "base":
            continue
        if field == "method":
            words.append(f"--{value}")
        elif field not in flags:
            words.append(f"{field}={_written(value)}")
        else:
            option = f"--{flags[field].replace('_', '-')}"
            values = value if isinstance(value, list) else [value]
            for one in values:
                words += [option] if one is True else [option, _written(one)]
    return shlex.join(words)


def _written(value: Any) -> str:
    """A value as a word of the command line."""
    if isinstance(value, dict):
        return ",".join(f"{role}={column}" for role, column in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    import shlex  # takes milliseconds, of which every start would pay

    for word, following in zip(args, [*args[1:], "-"], strict=True):
        if word.startswith(f"{name}="):
            return shlex.quote(word.partition("=")[2])
        if word == name and not following.startswith("-"):
            return shlex.quote(following)
    return None


# Positional words are told apart by `split_words`, so Typer shows only their names.
Words = Annotated[list[str] | None, typer.Argument(metavar="MODEL | KEY=VALUE", hidden=True)]
DataWords = Annotated[list[str] | None, typer.Argument(metavar="DATA | KEY=VALUE", hidden=True)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", hidden=True)]

RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE", help="recipe file, or the name of a shipped one")
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


def refuse_no_run(out: str | None, data: list[str]) -> None:
    """Raise UserError for a run to be resumed that is not there, unless the command line says enough to begin it."""
    if out is not None and not data:
        raise UserError(
            f"{out}: no run there to go on with", "see `llmctl runs list`, or leave out --resume to begin"
        )


def saved_recipe(out: str | None, overrides: list[str]) -> str | None:
    """The recipe a run to be resumed was started with, if its folder holds one."""
    from llmctl.runs import RECIPE

    out = next((word.partition("=")[2] for word in overrides if re.match(r"out=.", word)), out)
    if out is None or not (Path(out) / RECIPE).is_file():
        return None
    return str(Path(out) / RECIPE)
