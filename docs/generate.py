"""Write docs/reference.md from the recipe classes and the commands, and the tables of docs/architectures.md.

So neither is described twice.

python docs/generate.py            write the pages
python docs/generate.py --check    exit 1 if a page differs from what would be written
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmctl.recipe.goes_with import needs_in_words, refused_in_words
from llmctl.recipe.papers import Paper
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.variants import AXES

PAGE = Path(__file__).resolve().parent / "reference.md"
ARCHITECTURES = PAGE.with_name("architectures.md")
TABLE = re.compile(r"(<!-- variants: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLAIN = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

HEAD = """# Reference

Written by `make docs` from the recipe classes and the command line; do not edit it by hand.

Every field below is a key of a recipe file and a `key=value` word of the command line:
`llmctl pretrain train.max_steps=100` sets the same field as `train: {max_steps: 100}` in a file. Flags are
shorthands for fields. Where several are given, `key=value` wins over flags, and flags over the file.
"""


def reference() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *recipe_lines(), *command_lines()]).rstrip() + "\n"


# --- recipes ----------------------------------------------------------------------------------------


def recipe_lines() -> Iterator[str]:
    """One table a stage: field, value, default, meaning."""
    yield "## Recipe fields\n"
    for stage, kind in RECIPES.items():
        yield f"### `stage: {stage}`\n"
        yield f"{first_paragraph(kind)}\n"
        yield from table(["field", "value", "default", "meaning"], list(field_rows(kind)))


def field_rows(kind: type[BaseModel], above: str = "") -> Iterator[list[str]]:
    """Rows for the fields of a section and of the sections inside it; a tagged choice shows each kind."""
    for name, field in kind.model_fields.items():
        path = f"{above}{name}"
        inner = sections(field.annotation)
        if name == "stage" and not above:
            continue
        if not inner:
            yield [code(path), value_of(field), default_of(field), field.description or ""]
        elif len(inner) == 1:
            yield from field_rows(inner[0], f"{path}.")
        else:
            kinds = ", ".join(f"{code(tag_of(option))} ({first_paragraph(option)})" for option in inner)
            yield [code(path), "a section", default_of(field), f"{field.description}: {kinds}"]
            yield from choice_rows(inner, f"{path}.")


def choice_rows(options: list[type[BaseModel]], above: str) -> Iterator[list[str]]:
    """Rows for the fields of a tagged choice: each name once, with the kinds that have it."""
    names = list(dict.fromkeys(name for option in options for name in option.model_fields))
    for name in names:
        owners = [option for option in options if name in option.model_fields]
        fields = [option.model_fields[name] for option in owners]
        if name == tag_name(options[0]):
            tags = ", ".join(code(tag_of(option)) for option in owners)
            yield [code(f"{above}{name}"), tags, default_of(fields[0]), fields[0].description or ""]
            continue
        given = [
            f"{default_of(field)} ({tag_of(owner)})" for field, owner in zip(fields, owners, strict=True)
        ]
        same = len({default_of(field) for field in fields}) == 1
        only = f"; {', '.join(tag_of(o) for o in owners)} only" if len(owners) < len(options) else ""
        default = default_of(fields[0]) if same else ", ".join(given)
        yield [code(f"{above}{name}"), value_of(fields[0]), default, f"{fields[0].description}{only}"]


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside a type: none for a plain value, several for a tagged choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, dict, Literal):
        return []
    return [found for part in get_args(annotation) for found in sections(part)]


def tag_name(option: type[BaseModel]) -> str:
    """The field that tells one kind of a tagged choice from the others."""
    return next(n for n, f in option.model_fields.items() if get_origin(f.annotation) is Literal)


def tag_of(option: type[BaseModel]) -> str:
    """The value of that field in one kind."""
    return str(get_args(option.model_fields[tag_name(option)].annotation)[0])


def value_of(field: FieldInfo) -> str:
    """What may be written: a type with its limits, or the choices."""
    limits = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in LIMITS.items()
        if getattr(rule, name, None) is not None
    ]
    return " ".join([type_words(field.annotation), ", ".join(limits)]).strip()


def type_words(annotation: Any) -> str:
    """A type in words. Raises ValueError for one this page has no words for."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, parts = get_origin(annotation), [p for p in get_args(annotation) if p is not type(None)]
    if origin is Literal:
        return ", ".join(code(part) for part in parts)
    if origin is dict:
        return "a mapping of text to text"
    if origin is list:
        return f"list of {type_words(parts[0])}"
    if origin is Annotated or len(parts) == 1:
        return type_words(parts[0])
    if parts:
        return " or ".join(type_words(part) for part in parts)
    raise ValueError(f"no words for the type {annotation!r}; add it to PLAIN")


def default_of(field: FieldInfo) -> str:
    """The default as it would stand in a recipe file."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "unset"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, float):
        return code(f"{value:g}")
    return code(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# --- commands ---------------------------------------------------------------------------------------


def command_lines() -> Iterator[str]:
    """One part a command, in the order of `llmctl --help`."""
    import typer

    from llmctl.cli.main import app

    yield "## Commands\n"
    yield from command_part(typer.main.get_command(app), "llmctl")


def command_part(command: Any, name: str) -> Iterator[str]:
    """A command and everything below it.

    Args:
        command: Typer's command object, read by its attributes because it has no public class.
        name: the words that call it.
    """
    inside: dict[str, Any] = getattr(command, "commands", {})
    words = [word_of(p) for p in command.params if not p.opts[0].startswith("-")]
    usage = " ".join([name, *words, *(["COMMAND"] if inside else [])])
    yield f"### `{usage}`\n"
    # Typer keeps a docstring's line breaks; \f ends the part that is help
    text = (command.help or "").split("\f")[0].strip()
    if text:
        yield f"{text}\n"
    rows = [[code(call_of(p)), p.help or ""] for p in command.params if not getattr(p, "hidden", False)]
    if rows:
        yield from table(["word or flag", "meaning"], rows)
    for inner, below in inside.items():
        if not getattr(below, "hidden", False):
            yield from command_part(below, f"{name} {inner}")


def word_of(parameter: Any) -> str:
    """A positional word as the usage line shows it."""
    word = parameter.metavar or str(parameter.name).upper()
    many = "…" if parameter.nargs == -1 and "…" not in word and "..." not in word else ""
    return f"{word}{many}" if parameter.required or word.startswith("[") else f"[{word}{many}]"


def call_of(parameter: Any) -> str:
    """A parameter as one writes it: the word, or the flag with its value."""
    if not parameter.opts[0].startswith("-"):
        return word_of(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or str(parameter.name).upper()}"


# --- variants ---------------------------------------------------------------------------------------


def architectures() -> str:
    """docs/architectures.md as it stands, with every table between its marks written anew.

    Raises ValueError if an axis has no marks, or marks name no axis.
    """
    text = ARCHITECTURES.read_text(encoding="utf-8")
    marked = [found[1] for found in TABLE.findall(text)]
    if sorted(marked) != sorted(AXES):
        raise ValueError(f"docs/{ARCHITECTURES.name} has marks for {marked}, but there are {list(AXES)}")
    return TABLE.sub(lambda found: "\n".join([found[1], *variant_lines(found[2]), found[3]]), text)


def variant_lines(axis: str) -> Iterator[str]:
    """The table of one axis; a column that would be empty is left out."""
    head = [axis, "does", "in a recipe", "needs", "not with", "paper"]
    rows = [
        [
            code(name),
            variant.does,
            "<br>".join(code(word) for word in variant.words),
            code(needed) if (needed := needs_in_words(axis, name)) else "",
            refused_in_words(axis, name),
            link(variant.paper) if variant.paper else "",
        ]
        for name, variant in AXES[axis].variants.items()
    ]
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    yield from table([head[i] for i in filled], [[row[i] for i in filled] for row in rows])


def link(paper: Paper) -> str:
    """A paper, and where it is."""
    said = f"{paper.name} ({paper.year})"
    return f"[{said}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else said


# --- Markdown ---------------------------------------------------------------------------------------


def first_paragraph(kind: type[BaseModel]) -> str:
    """The first sentence of a class's docstring, on one line, without its period."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split()).rstrip(".")


def code(value: Any) -> str:
    """Inline code."""
    return f"`{value}`"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table, and an empty line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


PAGES: dict[Path, Callable[[], str]] = {PAGE: reference, ARCHITECTURES: architectures}


def main() -> int:
    """Write or check the pages; 0 if they are right afterwards."""
    parser = argparse.ArgumentParser(
        description="write docs/reference.md and the tables of docs/architectures.md"
    )
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    wrong = False
    for page, written in PAGES.items():
        text = written()
        if not check:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            wrong = True
            sys.stderr.write(f"error: docs/{page.name} is out of date\nhint: run `make docs`\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
