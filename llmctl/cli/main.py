"""The program: which commands there are, and how it starts and ends.

Starting is fast because nothing heavy is imported here: a command imports what it uses when it runs.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from llmctl import __version__
from llmctl.cli import (
    chat,
    data,
    doctor,
    explain,
    quantize,
    quickstart,
    recipe,
    runs,
    stages,
    tokenizer,
    tune,
)
from llmctl.cli.boundary import guard
from llmctl.cli.output import echo

Command = Callable[..., None]

# group -> its help and its commands
GROUPS: dict[str, tuple[str, dict[str, Command]]] = {
    "tokenizer": (
        "Train a tokenizer, compare tokenizers, see how one cuts text.",
        {"train": tokenizer.train, "eval": tokenizer.evaluate, "show": tokenizer.show},
    ),
    "data": (
        "See what data holds, and the rows that training makes of it.",
        {"inspect": data.inspect, "stats": data.stats},
    ),
    "runs": (
        "See the runs there are, and what each was made from.",
        {"list": runs.list_runs, "show": runs.show, "lineage": runs.lineage},
    ),
    "recipe": (
        "See, explain and check recipes.",
        {
            "list": recipe.list_recipes,
            "show": recipe.show,
            "check": recipe.check,
            "schema": recipe.schema,
            "variants": recipe.variants,
        },
    ),
}

# in the order of `llmctl --help`; a name without a command is a group
COMMANDS: dict[str, Command | None] = {
    "quickstart": quickstart.quickstart,
    "tokenizer": None,
    "data": None,
    "pretrain": stages.pretrain,
    "sft": tune.sft,
    "reward": tune.reward,
    "dpo": tune.dpo,
    "score": tune.score,
    "merge": tune.merge,
    "compare": tune.compare,
    "convert": tune.convert,
    "quantize": quantize.quantize,
    "generate": stages.generate,
    "chat": chat.chat,
    "eval": stages.evaluate,
    "explain": explain.explain,
    "runs": None,
    "recipe": None,
    "doctor": doctor.doctor,
}


def _print_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        echo(ctx.get_help())
        raise typer.Exit


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"llmctl {__version__}")
        raise typer.Exit


# Typer imports pydantic to look at an option whose value is not a plain bool, and its own --help of a
# group is one. These act before the options beside them are looked at.
ShowHelp = Annotated[
    bool, typer.Option("--help", "-h", is_eager=True, callback=_print_help, help="show this help")
]
ShowVersion = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
]

SPINS = 15_000  # of a waiting thread before it sleeps, about a millisecond; GNU OpenMP itself takes 300,000

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class InOrder(TyperGroup):
    """Lists commands and groups in the order of `COMMANDS`; Typer would put every group last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, as `llmctl --help` shows them."""
        return list(COMMANDS)


def build(completion: bool) -> typer.Typer:
    """The Typer app. `completion` adds Typer's options that install shell completion."""
    # Plain help, because rich would cost a tenth of a second at every start and draw boxes into pipes.
    plain: dict[str, Any] = {"rich_markup_mode": None, "context_settings": SETTINGS}
    program = typer.Typer(
        name="llmctl", cls=InOrder, add_completion=completion, pretty_exceptions_enable=False, **plain
    )
    alone: dict[str, Any] = {"invoke_without_command": True, "add_help_option": False}
    program.callback(**alone)(root)
    for name, command in COMMANDS.items():
        if command is not None:
            program.command(name)(command)
            continue
        help_text, inside = GROUPS[name]
        group = typer.Typer(help=help_text, **plain)
        group.callback(**alone)(help_if_alone)
        for inner, inner_command in inside.items():
            group.command(inner)(inner_command)
        program.add_typer(group, name=name)
    return program


def root(ctx: typer.Context, version: ShowVersion = False, show_help: ShowHelp = False) -> None:
    """Take a language model through its whole life: tokenizer, training, preferences, text.

    Results go to stdout, talk goes to stderr. See `llmctl COMMAND --help` too.
    """
    help_if_alone(ctx)


def help_if_alone(ctx: typer.Context, show_help: ShowHelp = False) -> None:
    """Show the help of a group that was called without a command."""
    _print_help(ctx, ctx.invoked_subcommand is None)


app = build(completion=True)


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command line (`sys.argv` by default) and exit with its code."""
    words = sys.argv[1:] if args is None else args
    quiet_libraries()
    bound_spinning()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that cannot show a character gets its code, not a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    # Typer's completion options make it import pydantic at every start, so they are there only where
    # they can be given: before any command, or when the shell asks for completions.
    wanted = not words or words[0].startswith("-") or "_LLMCTL_COMPLETE" in os.environ
    program = app if wanted else build(completion=False)
    sys.exit(
        guard(
            lambda: program(args=words, prog_name="llmctl", standalone_mode=False),
            words,
            command_name(words),
        )
    )


def quiet_libraries() -> None:
    """Keep what libraries say to programmers from the terminal: renamed methods, kernels that could be installed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|trl")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def bound_spinning() -> None:
    """Let OpenMP threads spin for a millisecond and then sleep while they wait, unless the user has said how they shall.

    OpenMP reads this when torch is imported. Threads that spin keep a core from the one they wait for wherever
    there are fewer free cores than threads. GNU's runtime lets them do so for some 20 ms: with one of two cores busy,
    decoding falls to a twentieth (`benchmarks/busy.py`).
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def command_name(words: list[str]) -> str:
    """The command a command line names: `llmctl runs show` for its first two words."""
    named = ["llmctl"]
    if words and words[0] in COMMANDS:
        named.append(words[0])
        if words[0] in GROUPS and len(words) > 1 and words[1] in GROUPS[words[0]][1]:
            named.append(words[1])
    return " ".join(named)
