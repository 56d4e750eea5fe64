"""Every recipe loads, every field has its words, every choice has its page, and the reference is current."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from llmctl.recipe import model, preference, schema, train, tune
from llmctl.recipe.load import check_file
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.words import WORDS

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "recipes").iterdir())

# Choices that a page explains, by the name of their type.
CHOICES: dict[str, Any] = (
    {
        name: getattr(model, name)
        for name in ("Family", "Norm", "Position", "Attention", "Pattern", "Ffn", "AttentionBias")
    }
    | {name: getattr(schema, name) for name in ("TokenizerKind", "Overlong")}
    | {"Method": tune.Method, "DpoLoss": preference.DpoLoss}
    | {"Schedule": train.Schedule, "DpoLoss": preference.DpoLoss}
)


def generator() -> ModuleType:
    """docs/generate.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = generator()


def test_recipes_are_few() -> None:
    assert 0 < len(SHIPPED) <= 20
    assert {path.suffix for path in SHIPPED} == {".yaml"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert re.match(r"# \S.*[.]$", lines[0]), "the first line says what the recipe is for"
    assert len(lines) <= 40
    recipe = check_file(path)
    assert recipe.model_fields_set, "a recipe that sets nothing is no recipe"
    assert type(recipe).model_fields["stage"].default in path.stem


def recipe_fields(kind: type[BaseModel], above: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted path, description) of every field of a recipe, sections and tagged choices included."""
    for name, field in kind.model_fields.items():
        yield f"{above}{name}", field.description
        for inner in GENERATE.sections(field.annotation):
            yield from recipe_fields(inner, f"{above}{name}.")


def test_every_field_has_words_and_every_word_a_field() -> None:
    described = dict(pair for kind in RECIPES.values() for pair in recipe_fields(kind))
    assert described.keys() == WORDS.keys()
    assert not [path for path, words in described.items() if not words]


def test_words_are_one_line_without_a_period() -> None:
    odd = [path for path, words in WORDS.items() if "\n" in words or words.endswith(".") or len(words) > 110]
    assert not odd


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_explained(choice: str) -> None:
    pages = [p for p in (ROOT / "docs").glob("*.md") if p.name not in ("reference.md", "log.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    missing = [name for name in get_args(CHOICES[choice]) if f"`{name}`" not in text]
    assert not missing, f"no page in docs/ explains {choice} {missing}"


@pytest.mark.parametrize("page", GENERATE.PAGES, ids=lambda page: page.name)
def test_what_is_written_by_a_program_is_current(page: Path) -> None:
    assert page.is_file(), "run `make docs`"
    assert page.read_text(encoding="utf-8") == GENERATE.PAGES[page](), "run `make docs`"


def test_every_axis_has_its_table_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GENERATE.ARCHITECTURES.read_text(encoding="utf-8")
    page = tmp_path / "architectures.md"
    monkeypatch.setattr(GENERATE, "ARCHITECTURES", page)
    page.write_text(text.replace("<!-- variants: norm -->", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="but there are"):
        GENERATE.architectures()
    # what stood between the marks is written anew
    emptied = GENERATE.TABLE.sub(lambda found: found[1] + found[3], text)
    assert "arXiv.org/abs/2405.21060".lower() not in emptied.partition("## Recipes of known")[0]
    page.write_text(emptied, encoding="utf-8")
    assert GENERATE.architectures() == text


def test_reference_has_every_field() -> None:
    text = "\n".join(GENERATE.recipe_lines())
    sections = {path.rsplit(".", 1)[0] for path in WORDS if "." in path} - {"model.rope_parameters"}
    assert not [path for path in WORDS if path not in sections | {"stage"} and f"`{path}`" not in text]


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_readme_commands_exist() -> None:
    """Each `llmctl …` line of the README names a command that the reference describes."""
    known = set(
        re.findall(r"^### `llmctl ([a-z ]+?)(?: [^a-z].*)?`$", "\n".join(GENERATE.command_lines()), re.M)
    )
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    text = "\n".join(blocks)
    used = re.findall(r"^(?:\S*/)?llmctl ((?:(?:tokenizer|data|runs|recipe) )?[a-z]+)", text, re.M)
    assert used
    assert not [command for command in used if command not in known]
