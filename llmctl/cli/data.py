"""`llmctl data inspect | stats`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.cli.options import AsJson, split_words
from llmctl.cli.output import cell_width, echo, figure, print_json, print_listing, print_table
from llmctl.cli.progress import make_talk
from llmctl.errors import UsageError, one_of
from llmctl.recipe.words import WORDS

if TYPE_CHECKING:
    from llmctl.cli.marked import Screen, Tokens
    from llmctl.recipe.tune import SftRecipe
    from llmctl.stages.inspect import Inspection, Part, Shown

SCREENFUL = 2000  # columns of text that are shown of a part of a row
LISTED = 60  # tokens that are listed of a part of a row
SETTINGS = ("data.template", "data.max_length", "data.text_field", "data.mask_prompt", "data.rewritten")
RARE = 0.001  # share of the letters below which a script is not named

Files = Annotated[list[str] | None, typer.Argument(metavar="FILE | KEY=VALUE", hidden=True)]
Template = Annotated[str | None, typer.Option("--template", metavar="NAME|FILE", help=WORDS["data.template"])]
MaxLength = Annotated[int | None, typer.Option("--max-length", metavar="N", help=WORDS["data.max_length"])]


def inspect(
    words: Files = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="model whose tokenizer, template and context make rows"
        ),
    ] = None,
    template: Template = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="rows to show", show_default=True)] = 3,
    first: Annotated[int, typer.Option("--from", metavar="K", help="the first row to show, from 1")] = 1,
    ids: Annotated[bool, typer.Option("--ids", help="a line for each token: position, id, text")] = False,
    max_length: MaxLength = None,
    overlong: Annotated[
        str | None, typer.Option("--overlong", metavar="NAME", help=WORDS["data.overlong"])
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="show all of long rows")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rows as training sees them, and which tokens are trained.

    FILE are files, folders, globs, builtin:NAME or data sets on the hub. All of it is read, checked and cut
    as `llmctl sft`, `reward` and `dpo` do it. KEY=VALUE sets a field of data that changes the rows, as
    data.mask_prompt=false.
    """
    recipe = _checked(
        words,
        {"base": model, "data.template": template, "data.max_length": max_length, "data.overlong": overlong},
        (*SETTINGS, "data.overlong"),
    )
    if recipe.base is None:
        raise UsageError(
            "missing option --model",
            "its tokenizer and template make the rows; `llmctl data stats` needs none",
        )
    for name, value in (("--rows", rows), ("--from", first)):
        if value < 1:
            raise UsageError(f"{name} is {value}", "rows are counted from 1")
    from llmctl.stages import inspect as stage

    talk = make_talk()
    found = stage.run(recipe, first, rows, talk)
    if as_json:
        print_json(_plain(found))
        return
    from llmctl.cli.marked import screen_of

    screen = screen_of(sys.stdout)
    if not ids:
        parts = {part.name for part in found.rows[0].parts}
        talk.say(
            screen.legend(
                "rejected" if "rejected" in parts else "unwanted" if "completion" in parts else None
            )
        )
    for number, row in enumerate(found.rows):
        if number or screen.width is not None:  # on a terminal what was said stands just before
            echo()
        _show_row(row, found, screen, ids, full)


def stats(
    words: Files = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="model to count tokens with")
    ] = None,
    template: Template = None,
    max_length: MaxLength = None,
    as_json: AsJson = False,
) -> None:
    """Show what data holds: formats, lengths, repeats.

    Also turns, system prompts, tools, scripts, and for preferences how far length alone decides; with
    --model, counts of tokens too.

    FILE are files, folders, globs, builtin:NAME or data sets on the hub. KEY=VALUE sets a field of data, as
    data.text_field=body.
    """
    recipe = _checked(
        words,
        {"base": model, "data.template": template, "data.max_length": max_length},
        SETTINGS,
    )
    needless = sorted(recipe.data.model_fields_set - {"train", "text_field"})
    if recipe.base is None and needless:
        raise UsageError(
            f"data.{needless[0]} is about tokens, which are not counted", "name a model with --model"
        )
    from llmctl.stages import stats as stage

    report = stage.run(recipe, make_talk())
    if as_json:
        print_json(report)
    else:
        _show_report(report)


def _checked(words: list[str] | None, flags: dict[str, Any], known: tuple[str, ...]) -> SftRecipe:
    """The model and the data section that the words and flags give. Raises UsageError for other settings."""
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.tune import SftRecipe

    files, overrides = split_words(words)
    for word in overrides:
        key = word.partition("=")[0]
        if key not in known:
            raise UsageError(f"{key} changes nothing here", f"what can be set is {one_of(list(known))}")
    if not files:
        raise UsageError("missing argument FILE", "name files, folders, globs or builtin:NAME")
    return load_recipe(SftRecipe, None, flags | {"data.train": files}, overrides)


# --- rows -------------------------------------------------------------------------------------------


def _plain(found: Inspection) -> dict[str, Any]:
    """An inspection as plain values."""
    return {
        "rows": [_plain_row(row) for row in found.rows],
        "of": found.of,
        "formats": found.formats,
        "max_length": found.max_length,
        "template": found.template,
        "stop_ids": found.stop_ids,
        "account": found.account.to_json(),
    }


def _plain_row(row: Shown) -> dict[str, Any]:
    made: dict[str, Any] = {"row": row.number, "place": row.place, "format": row.format, "cut": row.cut}
    if row.wanted is not None:
        made["label"] = row.wanted
    if len(row.parts) == 1:
        (part,) = row.parts
        return made | {"ids": part.ids, "trained": list(map(int, part.trained)), "text": "".join(part.texts)}
    for part in row.parts:
        made |= {f"{part.name}_ids": part.ids, part.name: "".join(part.texts)}
    return made


def _show_row(row: Shown, found: Inspection, screen: Screen, ids: bool, full: bool) -> None:
    from llmctl.cli.marked import Tokens, printable, shortened, show, units

    bold = "bold" if screen.colour else ""
    head = [f"row {row.number:,} of {found.of:,}", printable(row.place, screen), row.format, _sizes(row)]
    if row.wanted is not None:
        head.append(f"label {str(row.wanted).lower()}")
    head += [f"cut: {row.cut}"] if row.cut else []
    # a field is not broken, unless it is wider than the screen
    show([(f"{field}  ", bold) for field in head[:-1]] + [(head[-1], bold)], screen, sys.stdout)
    for part in row.parts:
        if len(row.parts) > 1:
            show([(part.name, bold)], screen, sys.stdout)
        refused = part.name == "rejected" or row.wanted is False
        tokens = Tokens(
            part.texts,
            part.trained,
            [token in found.special for token in part.ids],
            [token in found.stop_ids for token in part.ids],
            "bold red" if refused else "bold green",
        )
        if ids:
            _list_tokens(part, tokens, found, screen, full)
        else:
            costs = [_columns(text) for text in part.texts]
            shown = shortened(part.trained, costs, None if full else SCREENFUL)
            show(units(tokens, shown, screen), screen, sys.stdout, margin="  ")


def _sizes(row: Shown) -> str:
    if len(row.parts) == 1:
        return f"{row.tokens:,} tokens, {row.trained:,} trained"
    return ", ".join(f"{part.name} {len(part.ids):,}" for part in row.parts) + " tokens"


def _columns(text: str) -> int:
    """About how much of a screen a text takes; a line break half a line."""
    return cell_width(text) + 20 * text.count("\n")


def _list_tokens(part: Part, tokens: Tokens, found: Inspection, screen: Screen, full: bool) -> None:
    """A line a token: position, id, whether it is trained, entry of the vocabulary, text it completes."""
    from llmctl.cli.marked import Gap, printable, shortened, show

    shown = shortened(part.trained, [1] * len(part.ids), None if full else LISTED, least=4)
    lines: list[tuple[str, ...] | Gap] = [("position", "id", "trained", "token", "text")]
    for one in shown:
        if isinstance(one, Gap):
            lines.append(one)
            continue
        text = f'"{printable(part.texts[one], screen)}"' if part.texts[one] else ""
        lines.append(
            (
                str(one),
                str(part.ids[one]),
                "yes" if part.trained[one] else "",
                printable(found.entries[part.ids[one]], screen),
                text + ("  ends generation" if tokens.stops[one] else ""),
            )
        )
    cells = [line for line in lines if not isinstance(line, Gap)]
    wide = [max(cell_width(line[i]) for line in cells) for i in range(5)]
    unbroken = replace(screen, width=None)
    for line in lines:
        if isinstance(line, Gap):
            show([(line.said(screen.marks), "dim")], unbroken, sys.stdout, "  ")
            continue
        gaps = [" " * (width - cell_width(cell)) for cell, width in zip(line, wide, strict=True)]
        padded = [gaps[0] + line[0], gaps[1] + line[1], *(line[i] + gaps[i] for i in (2, 3)), line[4]]
        style = tokens.tone if line[2] == "yes" else ""
        show([("  ".join(padded).rstrip(), style)], unbroken, sys.stdout, "  ")


# --- statistics -------------------------------------------------------------------------------------


def _show_report(report: dict[str, Any]) -> None:
    from llmctl.cli.marked import printable, screen_of

    records = report["records"]
    formats = ", ".join(f"{count:,} {name}" for name, count in report["formats"].items())
    shown = {"records": f"{records:,} ({formats})"}
    if report["turns"]:
        shown["turns"] = _spread(report["turns"])
        systems = report["system_prompts"]
        shown["system prompts"] = _share(systems["records"], records) + (
            f", {systems['distinct']:,} distinct" if systems["records"] else ""
        )
        tools = report["tools"]
        shown["tools"] = _share(tools["records_with_tools"], records)
        shown["calls of tools"] = f"{tools['calls']:,} in {_share(tools['records_with_calls'], records)}"
    if empty := report["empty_inputs"]:
        shown["empty `input`"] = _share(empty["records"], empty["of"])
    repeats = report["duplicates"]
    shown["repeats"] = _share(repeats["records"], records)
    print_listing(shown)
    screen = screen_of(sys.stdout)
    for one in repeats["places"]:
        # within a file the line says enough
        first = one["first"].removeprefix(one["place"].rpartition(":")[0] + ":")
        echo(f"  {printable(one['place'], screen)} repeats the one at {printable(first, screen)}")
    for unit in ("characters", "bytes"):
        _show_spreads(f"{unit} of", "messages", {role: both[unit] for role, both in report["roles"].items()})
    echo()
    _show_scripts(report["scripts"])
    if choices := report["preferences"]:
        echo()
        print_listing(
            {
                "the longer answer is chosen": f"{choices['longer_chosen']:.1%}",
                "the shorter answer is chosen": f"{choices['shorter_chosen']:.1%}",
                "both are of one length": f"{choices['same_length']:.1%}",
                "a rule of length alone": f"is right in {choices['length_baseline']:.1%} of {choices['pairs']:,} pairs",
            }
        )
    if report["tokens"]:
        _show_tokens(report["tokens"])


def _show_spreads(what: str, counted: str, spreads: dict[str, dict[str, int]]) -> None:
    keys = ("count", "min", "median", "p95", "max", "total")
    echo()
    print_table(
        (what, counted, *keys[1:]),
        [(name, *(spread[key] for key in keys)) for name, spread in spreads.items()],
    )


def _show_scripts(scripts: dict[str, Any]) -> None:
    """Which scripts the letters are of; languages are not told apart."""
    named = {name: one for name, one in scripts.items() if one["letters"] >= RARE or one["records"]}
    rare = [one["letters"] for name, one in scripts.items() if name not in named]
    rows = [
        ("without letters" if name == "none" else name, f"{one['letters']:7.1%}", one["records"])
        for name, one in named.items()
    ]
    if rare:
        rows.append((f"{len(rare)} more", f"{sum(rare):7.1%}", 0))
    print_table(("script (not language)", "letters", "records mainly in it"), rows)


def _show_tokens(tokens: dict[str, Any]) -> None:
    _show_spreads("tokens of", "rows", tokens["lengths"])
    echo()
    rows = tokens["lengths"]["row"]["count"]
    print_listing(
        {
            f"longer than {tokens['context']:,} tokens": _share(tokens["longer_than_context"], rows),
            "trained tokens": f"{tokens['trained']:,}",
            "tokens per byte": tokens["tokens_per_byte"],
        }
    )


def _share(count: int, of: int) -> str:
    return f"{count:,} of {of:,}" + (f" ({count / of:.1%})" if count and of else "")


def _spread(spread: dict[str, int]) -> str:
    return ", ".join(f"{name} {figure(spread[name])}" for name in ("min", "median", "p95", "max"))
