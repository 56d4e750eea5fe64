"""`llmctl recipe list | show | check | schema | variants`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.cli.boundary import report
from llmctl.cli.options import AsJson
from llmctl.cli.output import print_json, print_table
from llmctl.errors import EXIT_USER_ERROR, UserError, nearest

if TYPE_CHECKING:
    from llmctl.recipe.variants import Axis

WIDE = 120  # columns from which the overview has papers


def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with llmctl."""
    from llmctl.recipe.load import check_file
    from llmctl.recipe.shipped import shipped_recipes

    rows = [
        {"name": name, "stage": check_file(path).stage_name, "about": _first_comment(path), "path": str(path)}
        for name, path in shipped_recipes().items()
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(("name", "stage", "about"), [(r["name"], r["stage"], r["about"]) for r in rows])


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def show(name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)], as_json: AsJson = False) -> None:
    """Show a recipe with every default and what each field means.

    NAME is a shipped recipe, a recipe file, or a stage: `recipe show pretrain` lists all fields of
    the stage with their defaults.
    """
    from llmctl.recipe.annotate import annotated, stage_defaults
    from llmctl.recipe.load import check_file
    from llmctl.recipe.schema import RECIPES
    from llmctl.recipe.shipped import find_recipe, shipped_recipes

    path = Path(name)
    every = name in RECIPES and not path.is_file()
    if every:
        recipe = stage_defaults(name)
    elif path.exists() or name in shipped_recipes() or not nearest(name, list(RECIPES)):
        recipe = check_file(find_recipe(name))
    else:
        raise UserError(f"{name}: no such recipe or stage", f"did you mean `{nearest(name, list(RECIPES))}`?")
    if as_json:
        print_json(recipe.model_dump(mode="json"))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(annotated(recipe, columns, every), end="")


def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE", hidden=True)],
    no_files: Annotated[
        bool, typer.Option("--no-files", help="leave out whether the files and folders it names are there")
    ] = False,
) -> None:
    """Check recipe files without running them, and that what they name is there.

    Data, base, tokenizer and template, from the folder you are in; ids of the hub are not looked up. All are
    checked; exit code 1 if one is wrong."""
    from llmctl.recipe.load import check_file
    from llmctl.recipe.named import refuse_missing
    from llmctl.recipe.shipped import find_recipe

    wrong = 0
    for file in files:
        try:
            path = find_recipe(file)
            recipe = check_file(path)
            if not no_files:
                refuse_missing(recipe, path)
            print(f"{path}: ok ({recipe.stage_name})")
        except UserError as error:
            wrong += 1
            report(error)
    if wrong:
        raise typer.Exit(EXIT_USER_ERROR)


def schema() -> None:
    """Print the JSON Schema of recipe files.

    An editor that knows it completes and checks what you write."""
    from pydantic import TypeAdapter

    from llmctl.recipe.schema import AnyRecipe

    described = TypeAdapter(AnyRecipe).json_schema()
    print_json(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "llmctl recipe"} | described
    )


def variants(
    axis: Annotated[str | None, typer.Argument(metavar="[AXIS]", hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Print what an architecture can be made of.

    Each axis is one choice: norm, position, pattern and so on. With AXIS: how a recipe asks for each of its
    variants, what it needs, what it does not go with, and its paper.
    """
    from llmctl.recipe.variants import AXES, find_axis

    shown = AXES if axis is None else {axis: find_axis(axis)}
    if as_json:
        print_json([row for name, chosen in shown.items() for row in _rows(name, chosen)])
        return
    if axis is not None:
        _print_axis(axis, shown[axis])
        return
    for name, chosen in AXES.items():
        _print_overview(name, chosen)
    print("llmctl recipe variants AXIS: how a recipe asks for each, and what it needs")


def _rows(axis: str, chosen: Axis) -> list[dict[str, Any]]:
    from llmctl.recipe.goes_with import needs, refused

    return [
        {
            "axis": axis,
            "field": chosen.field,
            "name": name,
            "does": variant.does,
            "recipe": variant.recipe,
            "needs": needs(axis, name),
            "not_with": refused(axis, name),
            "paper": None
            if variant.paper is None
            else {key: getattr(variant.paper, key) for key in ("name", "year", "arxiv")},
        }
        for name, variant in chosen.variants.items()
    ]


def _print_overview(axis: str, chosen: Axis) -> None:
    """One table of an axis: names, sentences, and papers where there is room."""
    found = [(f"  {name}", variant.paper or "", variant.does) for name, variant in chosen.variants.items()]
    if not sys.stdout.isatty() or shutil.get_terminal_size().columns >= WIDE:
        print_table((axis, "", chosen.about), found)
    else:
        print_table((axis, chosen.about), [(name, does) for name, _, does in found])
    print()


def _print_axis(axis: str, chosen: Axis) -> None:
    """Everything about the variants of one axis: a few lines each."""
    from llmctl.recipe.goes_with import needs_in_words, refused_in_words

    rows = []
    for name, variant in chosen.variants.items():
        facts = {
            "recipe": variant.recipe,
            "needs": needs_in_words(axis, name),
            "not with": refused_in_words(axis, name),
            "paper": str(variant.paper or ""),
        }
        rows += [("", ""), (f"  {name}", variant.does)]
        rows += [(f"    {kind}", said) for kind, said in facts.items() if said]
    print_table((axis, f"{chosen.about} ({chosen.field})"), rows)
