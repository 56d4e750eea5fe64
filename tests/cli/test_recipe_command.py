"""`llmctl recipe`: what is shown can be used again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from llmctl.cli.recipe import variants
from llmctl.errors import one_of
from llmctl.recipe.annotate import annotated
from llmctl.recipe.load import check_file, section_of
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.shipped import shipped_recipes
from llmctl.recipe.variants import AXES
from llmctl.recipe.words import WORDS
from tests.cli.terminal import Terminal
from tests.program import Program


def test_list(llmctl_: Program) -> None:
    rows = json.loads(llmctl_("recipe", "list", "--json").out)
    assert [row["name"] for row in rows] == list(shipped_recipes())
    assert all(row["about"] and row["stage"] in RECIPES for row in rows)
    text = llmctl_("recipe", "list").out
    assert all(row["about"] in text for row in rows)


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_show_is_a_recipe_again(name: str, llmctl_: Program) -> None:
    ended = llmctl_("recipe", "show", name)
    Path("shown.yaml").write_text(ended.out, encoding="utf-8")
    assert check_file(Path("shown.yaml")) == check_file(shipped_recipes()[name])


@pytest.mark.parametrize("stage", list(RECIPES))
def test_show_of_a_stage_explains_every_field(stage: str, llmctl_: Program) -> None:
    text = llmctl_("recipe", "show", stage).out
    assert text.startswith(f"stage: {stage} ")
    Path("shown.yaml").write_text(text, encoding="utf-8")
    check_file(Path("shown.yaml"))
    assert all("  # " in line for line in text.splitlines())
    # those of sections that are unset stand there as comments
    shown = {line.split(":")[0].strip(" #") for line in text.splitlines()}
    assert set(field_names(RECIPES[stage])) <= shown


def field_names(kind: type[BaseModel]) -> Iterator[str]:
    """Every field of a recipe and of its sections; of a tagged choice only the choice itself."""
    for name, field in kind.model_fields.items():
        yield name
        inside = section_of(field.annotation)
        if inside is not None:
            yield from field_names(inside)


def test_show_keeps_odd_values(llmctl_: Program) -> None:
    odd = {"tokenizer": "true", "out": "a: b # c", "base": 'quote " and \\ and é'}
    Path("odd.yaml").write_text(
        "stage: pretrain\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in odd.items())
    )
    Path("shown.yaml").write_text(llmctl_("recipe", "show", "odd.yaml").out, encoding="utf-8")
    assert check_file(Path("shown.yaml")) == check_file(Path("odd.yaml"))
    assert json.loads(llmctl_("recipe", "show", "odd.yaml", "--json").out)["out"] == "a: b # c"


def test_comments_are_broken_to_fit_a_terminal(tmp_path: Path) -> None:
    recipe = check_file(shipped_recipes()["pretrain-5m"])
    text = annotated(recipe, 80)
    assert max(map(len, text.splitlines())) <= 80
    (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
    assert check_file(tmp_path / "shown.yaml") == recipe
    assert text.split() != annotated(recipe).split(), "nothing was broken, so nothing was tested"
    assert annotated(recipe, 40) == annotated(recipe)


def test_check_tells_every_file(llmctl_: Program) -> None:
    Path("good.yaml").write_text("stage: pretrain\n")
    Path("bad.yaml").write_text("stage: pretrain\ntrain: {max_step: 1}\n")
    Path("worse.yaml").write_text("stage: pretrane\n")
    ended = llmctl_("recipe", "check", "bad.yaml", "good.yaml", "worse.yaml", "pretrain-5m")
    assert ended.code == 1
    assert ended.out.startswith("good.yaml: ok (pretrain)\n")
    assert ended.out.endswith("pretrain-5m.yaml: ok (pretrain)\n")
    assert ended.err.splitlines() == [
        "error: bad.yaml: train.max_step: unknown key",
        "hint: did you mean `max_steps`?",
        f"error: worse.yaml: stage: `pretrane` is not one of {one_of(list(RECIPES))}",
        "hint: did you mean `pretrain`?",
    ]
    assert llmctl_("recipe", "check", "good.yaml").code == 0


def test_schema_is_strict_and_described(llmctl_: Program) -> None:
    schema = json.loads(llmctl_("recipe", "schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["discriminator"]["mapping"].keys() == RECIPES.keys()
    for name, part in schema["$defs"].items():
        assert part["additionalProperties"] is False, name
    rate = schema["$defs"]["TrainSection"]["properties"]["learning_rate"]
    assert rate["description"] == WORDS["train.learning_rate"]
    assert rate["exclusiveMinimum"] == 0


def test_variants_prints_every_axis(llmctl_: Program) -> None:
    text = llmctl_("recipe", "variants").out
    for axis, chosen in AXES.items():
        assert re.search(rf"^{axis} .*{re.escape(chosen.about)}$", text, re.M)
        for name, variant in chosen.variants.items():
            assert re.search(rf"^  {re.escape(name)} .*{re.escape(variant.does)}$", text, re.M)


def test_variants_of_an_axis_say_how_to_ask(llmctl_: Program) -> None:
    text = llmctl_("recipe", "variants", "mixer").out
    part = text[text.index("  mamba2") :]
    assert [line.split(maxsplit=1)[0] for line in part.splitlines()] == ["mamba2", "recipe", "not", "paper"]
    assert "model.pattern=[mamba2]" in part and "stack other than decoder" in part
    assert "arXiv:2405.21060" in part
    needed = llmctl_("recipe", "variants", "pattern").out
    assert re.search(r"^    needs +sliding_window, dilation$", needed, re.M)


def test_variants_as_json(llmctl_: Program) -> None:
    rows = json.loads(llmctl_("recipe", "variants", "--json").out)
    assert [(row["axis"], row["name"]) for row in rows] == [(a, n) for a in AXES for n in AXES[a].variants]
    one = json.loads(llmctl_("recipe", "variants", "experts", "--json").out)
    assert one == [row for row in rows if row["axis"] == "experts"]
    assert one[3] == {
        "axis": "experts",
        "field": "model.experts.kind",
        "name": "slots",
        "does": AXES["experts"].variants["slots"].does,
        "recipe": "model.experts.kind=slots model.stack=encoder",
        "needs": ["model.stack=encoder"],
        "not_with": {},
        "paper": {"name": "Soft MoE, Puigcerver et al.", "year": 2023, "arxiv": "2308.00951"},
    }


def test_an_unknown_axis_is_told_the_nearest(llmctl_: Program) -> None:
    ended = llmctl_("recipe", "variants", "positon")
    assert ended.code == 1 and ended.out == ""
    assert ended.err.startswith("error: positon: not one of `stack`, `position`, `rope_type`")
    assert ended.err.endswith("\nhint: did you mean `position`?\n")


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("axis", [None, *AXES])
def test_variants_fit_a_terminal(axis: str | None, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(columns, 1000)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    variants(axis)
    written = "".join(line + "\n" for line in terminal.lines).split()
    for name, variant in (AXES[axis] if axis else AXES["norm"]).variants.items():
        assert name in written
        assert any(line.strip().startswith(name) and len(line) <= columns for line in terminal.lines)
        assert set(variant.does.split()) <= set(written)
    # a line that did not fit would go on at the left margin, where only axes stand
    margins = {line.split(" ")[0] for line in terminal.lines if line[:1].strip()}
    assert margins <= {*AXES, "llmctl"}
    assert (axis is None and columns == 160) == (axis is None and "arXiv:1910.07467" in " ".join(written))


def test_check_looks_at_what_a_recipe_names(llmctl_: Program) -> None:
    recipe = Path("r.yaml")
    for field, text in {
        "base": "base: ./nothing",
        "data.train": "data: {train: [answers.json]}",
        "data.template": "data: {template: mine.jinja}",
    }.items():
        recipe.write_text(f"stage: sft\n{text}\n")
        ended = llmctl_("recipe", "check", "r.yaml")
        assert ended.code == 1
        assert ended.err.startswith(f"error: r.yaml: {field}: ")
        assert "no such file or folder\nhint: --no-files checks" in ended.err
        assert llmctl_("recipe", "check", "r.yaml", "--no-files").out == "r.yaml: ok (sft)\n"
    Path("answer.json").write_text("[]")
    recipe.write_text("stage: sft\nbase: owner/name\ndata: {train: [answers.json, builtin:tinyworld]}\n")
    assert "did you mean `answer.json`?" in llmctl_("recipe", "check", "r.yaml").err
    Path("answers.json").write_text("[]")
    assert llmctl_("recipe", "check", "r.yaml").code == 0


def test_show_lists_what_a_field_may_be(llmctl_: Program) -> None:
    shown = llmctl_("recipe", "show", "sft").out
    lines = {line.split(":")[0].strip(): line for line in shown.splitlines()}
    assert lines["method"].endswith("(lora | qlora | full)")
    assert lines["lr_scheduler_type"].endswith("(cosine | linear | constant | warmup_stable_decay)")
    assert lines["overlong"].endswith("(error | drop | truncate | split)")
    assert "learning_rate: auto" in shown and "auto: by method and size" in lines["learning_rate"]
    assert "(sft)" not in lines["stage"]
