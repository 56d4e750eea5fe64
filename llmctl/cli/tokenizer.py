"""`llmctl tokenizer train | eval | show`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmctl.cli.options import AsJson, DataWords, RecipeFile, flag, given, split_words
from llmctl.cli.output import one_line, print_json, print_listing, print_table
from llmctl.cli.progress import make_talk
from llmctl.recipe.words import WORDS


def train(
    ctx: typer.Context,
    words: DataWords = None,
    kind: Annotated[str | None, flag("tokenizer", "kind", "NAME")] = None,
    vocab_size: Annotated[int | None, flag("tokenizer", "vocab_size", "N")] = None,
    out: Annotated[str | None, flag("tokenizer", "out", "DIR")] = None,
    recipe: RecipeFile = None,
    as_json: AsJson = False,
) -> None:
    """Learn a tokenizer from DATA.

    DATA are files, folders, globs or builtin:NAME. KEY=VALUE sets any field of the recipe; `llmctl recipe show tokenizer` lists them.
    """
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.schema import TokenizerRecipe

    data, overrides = split_words(words)
    flags = given(ctx, "tokenizer") | {"data.train": data or None}
    checked = load_recipe(TokenizerRecipe, recipe, flags, overrides)
    from llmctl.stages import tokenizer as stage

    result = stage.run(checked, make_talk())
    if as_json:
        print_json({"run": result.path, "metrics": result.metrics})
    else:
        print_listing({"run": str(result.path), **result.metrics})


def evaluate(
    tokenizers: Annotated[list[str], typer.Argument(metavar="TOKENIZER", hidden=True)],
    data: Annotated[
        list[str], typer.Option("--data", metavar="PATH", help=f"{WORDS['eval.data']} (may be repeated)")
    ],
    text_field: Annotated[
        str | None, typer.Option("--text-field", metavar="NAME", help=WORDS["data.text_field"])
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare tokenizers on text.

    Bytes per token, fertility, unknown rate, round trip and speed. TOKENIZER is a run folder, a Hugging Face folder or a hub id; name several to compare them.
    """
    from llmctl.recipe.schema import TokenizerData
    from llmctl.stages import tokenizer as stage

    field = TokenizerData().text_field if text_field is None else text_field
    rows = stage.evaluate(tokenizers, data, field)
    if as_json:
        print_json(rows)
    else:
        print_table(
            ["", *(row["tokenizer"] for row in rows)],
            [
                [name.replace("_", " "), *(row[name] for row in rows)]
                for name in rows[0]
                if name != "tokenizer"
            ],
        )


def show(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", hidden=True)],
    text: Annotated[str, typer.Argument(metavar="TEXT", hidden=True)],
    as_json: AsJson = False,
) -> None:
    """Show how TOKENIZER cuts TEXT."""
    from llmctl.stages import tokenizer as stage

    rows = stage.show(tokenizer, text)
    if as_json:
        print_json([{"id": i, "token": token, "bytes": raw.hex(" ")} for i, token, raw in rows])
    else:
        print_table(
            ("id", "token", "bytes", "text"),
            [(str(i).rjust(6), token, raw.hex(" "), _decoded(raw)) for i, token, raw in rows],
        )


def _decoded(raw: bytes) -> str:
    """A token's bytes as text in quotes; bytes that are only part of a character show as \\x.."""
    return f'"{one_line(raw.decode("utf-8", "backslashreplace"))}"'
