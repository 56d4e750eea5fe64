"""`llmctl explain`: the walk from a text to the next token, and the size of a model."""

from __future__ import annotations

import os
import pydoc
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from llmctl.cli.options import AsJson, Overrides, RecipeFile, one_model, split_words
from llmctl.cli.output import echo, harmless, print_json, print_table, size
from llmctl.cli.progress import make_talk
from llmctl.errors import UsageError, UserError, one_of
from llmctl.recipe.words import WORDS

if TYPE_CHECKING:
    from llmctl.recipe.model import ModelSection

EXAMPLE = 'llmctl explain MODEL "Once upon a time"'


def explain(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", hidden=True)] = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", hidden=True)] = None,
    words: Overrides = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", metavar="N", help="the layer told step by step; the first when unset"),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="tell every layer step by step, with all heads")
    ] = False,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="write it as one page for a browser")
    ] = None,
    only_size: Annotated[
        bool, typer.Option("--size", help="parameters, bytes, KV-cache and FLOPs; no weights are needed")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", help="with --size: context; the model's when unset")
    ] = None,
    recipe: RecipeFile = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help=WORDS["device"])] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show how MODEL gets from TEXT to the next token.

    Step by step: tokens, embedding, positions, what each layer does and with which weights, logits, probabilities.
    MODEL is a run folder, a Hugging Face folder or a hub id; with --size also a recipe of stage pretrain, whose
    fields KEY=VALUE sets.
    """
    if only_size:
        refuse(("--layer", "--full", "--html"), (layer, full, html), "--size prints a table")
        given = [word for word in (model, text, *(words or [])) if word is not None]
        show_size(*split_words(given), recipe, tokens, as_json)
        return
    refuse(("--recipe", "--tokens"), (recipe, tokens), "it goes with --size")
    if model is None:
        raise UsageError("missing argument MODEL", f"for example {EXAMPLE}")
    if text is None:
        raise UsageError("missing argument TEXT", f"for example {EXAMPLE}; --size needs none")
    if words:
        raise UsageError(f"unexpected argument: {words[0]}", "put quotes around a TEXT of several words")
    if as_json:
        refuse(("--html", "--layer", "--full"), (html, layer, full), "--json prints everything")
    if html is not None:
        refuse(("--full",), (full,), "a page shows every layer")
        if not html:
            raise UsageError("--html is empty", "name a file")
    check_words(text, device)
    if _names_recipe(model) and not Path(model).is_file():
        raise UserError(
            f"{model}: a recipe, which has no weights", "train it first; --size says what it will cost"
        )
    show_walk(model, text, device, layer, full, html, as_json)


def refuse(names: tuple[str, ...], values: tuple[Any, ...], why: str) -> None:
    """Raise UsageError for the first flag that was given and would say nothing here."""
    for name, value in zip(names, values, strict=True):
        if value not in (None, False):
            raise UsageError(f"{name} has no use here: {why}", f"leave out {name}")


def check_words(text: str, device: str) -> None:
    """Raise UserError for a text that cannot be one, and a device that does not exist."""
    from llmctl.recipe.train import Device

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not UTF-8 (character {error.start + 1})", "convert it to UTF-8"
        ) from None
    if device not in get_args(Device):
        raise UserError(
            f"--device: `{device}` is not one of {one_of(list(get_args(Device)))}", "leave it out"
        )


def show_walk(
    model: str, text: str, device: str, layer: int | None, full: bool, html: str | None, as_json: bool
) -> None:
    """Trace the text and show it: on the terminal, as JSON, or as a page in the file `html`."""
    page = None if html is None else Path(html)
    if page is not None:
        from llmctl.cli.explain_page import check_page

        check_page(page)
    from llmctl.stages import explain as stage

    talk = make_talk()
    walk = stage.run(model, text, device, talk, layer)
    if as_json:
        print_json(stage.as_json(walk))
    elif page is not None:
        from llmctl.cli.explain_page import write_page

        write_page(walk, page, layer or 0)
        talk.say(f"{page}: open it in a browser")
    else:
        from llmctl.cli.explain_text import walk_lines

        show_paged(walk_lines(walk, shutil.get_terminal_size().columns, layer, full))


def show_paged(lines: list[str]) -> None:
    """Print lines; on a terminal too low for them, through $PAGER or less. A $PAGER that is not there is passed over."""
    named = (os.environ.get("MANPAGER") or os.environ.get("PAGER") or "").split()  # as pydoc looks for one
    lines = [harmless(line) for line in lines]  # a pager obeys what it is given
    missing = bool(named) and shutil.which(named[0]) is None
    if not missing and sys.stdout.isatty() and len(lines) >= shutil.get_terminal_size().lines:
        pydoc.pager("\n".join(lines) + "\n")
    else:
        echo("\n".join(lines))


def show_size(
    plain: list[str], overrides: list[str], recipe: str | None, tokens: int | None, as_json: bool
) -> None:
    """Print what a model or the model of a recipe costs. The positional words are split in `plain` and `overrides`."""
    from llmctl.stages import size as stage

    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens is {tokens}", "name 1 or more")
    name = one_model(plain)
    if name is not None and recipe is not None:
        raise UsageError("MODEL and --recipe both name a model", "leave out one of them")
    found = stage.run(_architecture(name, recipe, overrides), tokens)
    if as_json:
        print_json({"source": recipe or name, **found})
    else:
        print_size(found)


def _architecture(name: str | None, recipe: str | None, overrides: list[str]) -> ModelSection:
    from llmctl.stages import size as stage

    file = recipe or (name if name is not None and _names_recipe(name) else None)
    if file is None and name is None and not overrides:
        raise UsageError("missing argument MODEL", "name a model or a recipe, or --recipe FILE")
    if file is not None or name is None:
        from llmctl.recipe.load import load_recipe
        from llmctl.recipe.schema import PretrainRecipe

        return stage.spec_of_recipe(load_recipe(PretrainRecipe, file, {}, overrides), file or "command line")
    if overrides:
        raise UserError(
            f"{overrides[0]}: sets a field of a recipe, but {name} is a model that has its sizes",
            "leave it out, or name a recipe",
        )
    return stage.spec_of_model(name)


def _names_recipe(name: str) -> bool:
    """Whether a word names a recipe file or a shipped recipe, rather than a folder or a hub id."""
    from llmctl.recipe.shipped import shipped_recipes

    path = Path(name).expanduser()
    return path.is_file() or (not path.is_dir() and name in shipped_recipes())


def print_size(found: dict[str, Any]) -> None:
    """The figures of `stages/size.py` for a reader."""
    counts, tokens = dict(found["parameters"]), found["tokens"]
    total, active = counts.pop("total"), counts.pop("active")
    rows = [(part, count, f"{count / total:.1%}") for part, count in [*counts.items(), ("all", total)]]
    if active != total:
        rows.append(("active", active, f"{active / total:.1%}"))
    print_table(("part", "parameters", "share"), rows)
    echo()
    print_table(("weights", "size"), [(name, size(count)) for name, count in found["bytes"].items()])
    cache = found["kv_cache"]
    if cache is not None:
        echo(f"\nKV-cache of {tokens:,} tokens in bfloat16:")
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
        echo(textwrap.fill(cache["formula"], columns, initial_indent="  ", subsequent_indent="  "))
        echo(
            f"  {size(cache['bytes']['bfloat16'])}; {size(cache['bytes']['float32'])} in float32, as on a CPU"
        )
    echo(f"\nFLOPs for a token, on average over {tokens:,}:")
    for name, count in found["flops_per_token"].items():
        echo(f"  {name:<8}  {count:,}")
