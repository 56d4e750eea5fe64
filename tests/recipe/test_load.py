"""Strict in, helpful out: each wrong recipe is told with its file, key and a hint."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.recipe.annotate import annotated
from llmctl.recipe.load import check_file, dump_recipe, is_override, load_recipe
from llmctl.recipe.schema import RECIPES, PretrainRecipe, StageRecipe
from llmctl.recipe.shipped import find_recipe, shipped_recipes
from llmctl.recipe.yaml import parse_yaml

EXPLAINS = "`llmctl recipe show pretrain` explains "
STAGES = "`tokenizer`, `pretrain`, `sft`, `reward`, `dpo`, `score`, `merge`, `compare`, `convert`, `quantize`, `generate`, `chat`, `eval`"

# recipe text (a leading `stage: pretrain` line is added) -> message after the file name, hint
WRONG: dict[str, tuple[str, str]] = {
    "train: {max_step: 1}": ("train.max_step: unknown key", "did you mean `max_steps`?"),
    "foo: 1": (
        "foo: unknown key",
        "known keys here: stage, out, device, base, tokenizer, model, data, train",
    ),
    "model: {hiden_size: 8}": ("model.hiden_size: unknown key", "did you mean `hidden_size`?"),
    "model: {norm: rmsnrom}": (
        "model.norm: `rmsnrom` is not one of `rmsnorm`, `rmsnorm1p`, `layernorm`",
        "did you mean `rmsnorm`?",
    ),
    "model: {pattern: [full, slidng]}": (
        "model.pattern.1: `slidng` is not one of `full`, `sliding`, `band`, `dilated`, `global`, `random`, `block`, "
        "`routing`, `lsh`, `mamba2`",
        "did you mean `sliding`?",
    ),
    "model: {pattern: []}": ("model.pattern: should not be empty", EXPLAINS + "model.pattern"),
    "train: {max_steps: '5'}": (
        "train.max_steps: should be a valid integer, not the text `5`",
        EXPLAINS + "train.max_steps",
    ),
    "train: {max_steps: 5.0}": (
        "train.max_steps: should be a valid integer, not 5.0",
        EXPLAINS + "train.max_steps",
    ),
    "train: {max_steps: 0}": (
        "train.max_steps: should be greater than or equal to 1, not 0",
        EXPLAINS + "train.max_steps",
    ),
    "train: {learning_rate: .inf}": (
        "train.learning_rate: should be a finite number, not inf",
        EXPLAINS + "train.learning_rate",
    ),
    "data: {packing: yes}": (
        "data.packing: should be a valid boolean, not the text `yes`",
        "write true or false",
    ),
    "data: {train: x.txt}": (
        "data.train: should be a valid list, not the text `x.txt`",
        "write it as a list: [x.txt]",
    ),
    "data: {train: 3}": ("data.train: should be a valid list, not 3", "write it as a list: [A, B]"),
    "data: {train: [1]}": ("data.train.0: should be a valid string, not 1", 'put quotes around it: "1"'),
    "out: 2024": ("out: should be a valid string, not 2024", 'put quotes around it: "2024"'),
    "data: 3": ("data: should be a section of keys and values, not 3", EXPLAINS + "data"),
    "data:": ("data: should be a section of keys and values, not nothing", EXPLAINS + "data"),
    "model: {rope_parameters: {rope_type: lnear}}": (
        "model.rope_parameters: `lnear` is not one of `default`, `linear`, `ntk`, `yarn`, `llama3`",
        "did you mean `linear`?",
    ),
    "model: {rope_parameters: {rope_type: linear}}": (
        "model.rope_parameters.factor: this key is required",
        EXPLAINS + "model.rope_parameters.factor",
    ),
    "model: {rope_parameters: {rope_type: linear, factr: 2.0}}": (
        "model.rope_parameters.factr: unknown key",
        "did you mean `factor`?",
    ),
    "model: {rope_parameters: {rope_thet: 2.0}}": (
        "model.rope_parameters.rope_thet: unknown key",
        "did you mean `rope_theta`?",
    ),
    "model: {num_attention_heads: 3}": (
        "model: hidden_size (256) is not a multiple of num_attention_heads (3); set head_dim to choose a width",
        EXPLAINS + "model",
    ),
    "model: {num_attention_heads: 4, num_key_value_heads: 3}": (
        "model: num_attention_heads (4) is not a multiple of num_key_value_heads (3)",
        EXPLAINS + "model",
    ),
    "model: {head_dim: 5}": (
        "model: head_dim (5) is odd: rotary positions turn pairs of channels",
        EXPLAINS + "model",
    ),
    "model: {pattern: [sliding]}": (
        "model: pattern has `sliding` layers but sliding_window is unset",
        EXPLAINS + "model",
    ),
    "model: {sliding_window: 4}": (
        "model: sliding_window is set but no layer of pattern is `sliding`, `band`, `dilated`",
        EXPLAINS + "model",
    ),
    "model: {experts: {kind: sparse, num_experts_per_tok: 3, n_group: 4}}": (
        "model: experts.num_experts_per_tok (3) is more than the 2 experts that topk_group (1) of n_group (4) "
        "groups hold",
        EXPLAINS + "model",
    ),
    "base: x\nmodel: {}": (
        "`model` describes a new model, but `base` continues an existing one; drop one",
        EXPLAINS + "every field",
    ),
    # YAML itself
    "train:\n  seed: 1\n  seed: 2": ("line 4: `seed` was already set on line 3", "keep one of them"),
    "\ttrain: 1": (
        "line 2: found character '\\t' that cannot start any token",
        "check indentation, colons and quotes",
    ),
    "a: b: c": ("line 2: mapping values are not allowed here", "check indentation, colons and quotes"),
    "3: x": ("line 2: key 3 is not a word", "quote it if it is meant as text"),
    "train: {<<: {seed: 3}}": ("train.<<: unknown key", "known keys here: max_steps, num_train_epochs"),
    "a: \x01": (
        "not valid YAML: unacceptable character #x0001: special characters are not allowed",
        "remove characters that are not text",
    ),
}


def told(path: Path) -> tuple[str, str | None]:
    with pytest.raises(UserError) as caught:
        check_file(path)
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"stage: pretrain\n{text}", encoding="utf-8")
    message, hint = told(path)
    assert message == f"{path}: {WRONG[text][0]}"
    assert hint is not None
    # the list of all keys of a section grows; its beginning is enough
    assert hint.startswith(WRONG[text][1]) if "known keys" in hint else hint == WRONG[text][1]


FIRST_LINE = "the first line of a recipe is `stage: NAME`"


@pytest.mark.parametrize(
    ("raw", "message", "hint"),
    [
        (b"", "a recipe is a mapping of keys to values", FIRST_LINE),
        (b"- a", "a recipe is a mapping of keys to values", FIRST_LINE),
        (b"out: x", "stage: is missing", FIRST_LINE),
        (b"stage: 3", f"stage: `3` is not one of {STAGES}", FIRST_LINE),
        (b"stage: [a]", f"stage: `['a']` is not one of {STAGES}", FIRST_LINE),
        (b"stage: pretrian", f"stage: `pretrian` is not one of {STAGES}", "did you mean `pretrain`?"),
        (b"stage: pretrain\nout: \xff", "not UTF-8 text (byte 21)", "save the file as UTF-8"),
        (
            codecs.BOM_UTF16_LE + "stage: eval".encode("utf-16-le"),
            "not UTF-8 text (byte 0)",
            "save the file as UTF-8",
        ),
    ],
)
def test_wrong_files(raw: bytes, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    assert told(path) == (f"{path}: {message}", hint)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path) == (f"{tmp_path}: is a folder, not a recipe file", "name the file inside it")
    gone = tmp_path / "gone.yaml"
    assert told(gone) == (f"{gone}: no such file", "see `llmctl recipe list`")

    def refuse(path: Path, most: int) -> bytes:
        raise PermissionError(13, "no", str(path))

    monkeypatch.setattr("llmctl.recipe.yaml.read_bounded", refuse)
    assert told(gone) == (f"{gone}: no permission to read it", f"chmod u+r {gone}")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(codecs.BOM_UTF8 + b"stage: pretrain\n")
    assert check_file(path) == PretrainRecipe()


# --- the command line -------------------------------------------------------------------------------

WRONG_WORDS: list[tuple[dict[str, Any], list[str], str, str]] = [
    ({}, ["train.=3"], "`train.=3` is not of the form key=value", "for example train.max_steps=100"),
    (
        {},
        ["train.max_steps="],
        "command line: train.max_steps: should be a valid integer, not the text ``",
        EXPLAINS + "train.max_steps",
    ),
    (
        {},
        ["train=3", "train.seed=1"],
        "command line: train.seed: `train` is a value, not a section",
        "drop one of the two settings",
    ),
    (
        {},
        ["train.seed.x=1"],
        "command line: train.seed: should be a valid integer, not a section",
        EXPLAINS + "train.seed",
    ),
    (
        {},
        ["a=[1"],
        "a=: line 1: expected ',' or ']', but got '<stream end>'",
        "check indentation, colons and quotes",
    ),
    (
        {"base": "m"},
        ["model.hidden_size=64"],
        "command line: `model` describes a new model, but `base` continues an existing one; drop one",
        EXPLAINS + "every field",
    ),
    (
        {},
        ["model.num_clusters=8"],
        "command line: model.num_clusters: unknown key",
        "did you mean `model.routing.num_clusters`?",
    ),
    (
        {},
        ["max_steps=8"],
        "command line: max_steps: unknown key",
        "did you mean `train.max_steps`?",
    ),
    (
        {},
        ["model.experts.num_experts=4"],
        "command line: model.experts: kind is unset",
        "set model.experts.kind to one of `sparse`, `dense`, `soft`, `slots`, `expert_choice`",
    ),
    (
        {},
        ["model.num_hidden_layers=10001"],
        "command line: model.num_hidden_layers: should be less than or equal to 10000, not 10001",
        EXPLAINS + "model.num_hidden_layers",
    ),
    (
        {"train.seed": -1},
        [],
        "command line: train.seed: should be greater than or equal to 0, not -1",
        EXPLAINS + "train.seed",
    ),
]


@pytest.mark.parametrize(("flags", "words", "message", "hint"), WRONG_WORDS)
def test_wrong_words(flags: dict[str, Any], words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(PretrainRecipe, None, flags, words)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_blame_falls_on_where_the_value_came_from(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train: {seed: -1}")
    for words, source in (([], str(path)), (["train.seed=-2"], "command line")):
        with pytest.raises(UserError, match=r"train\.seed: should be") as caught:
            load_recipe(PretrainRecipe, str(path), {}, words)
        assert caught.value.message.startswith(f"{source}: ")


@pytest.mark.parametrize(
    ("word", "blamed"),
    [
        ("model.pattern=[slidding]", "command line: model.pattern.0: `slidding`"),
        ("model.pattern=[sliding]", "{file} and command line: model: pattern has `sliding` layers"),
        ("train.seed=2", "{file}: model: sliding_window is set but no layer"),
    ],
)
def test_blame_for_what_does_not_go_together(word: str, blamed: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {sliding_window: 4}" if "train" in word else "")
    with pytest.raises(UserError) as caught:
        load_recipe(PretrainRecipe, str(path), {}, [word])
    assert caught.value.message.startswith(blamed.format(file=path))


def test_words_win_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train: {seed: 1, max_steps: 1, threads: 1}\nmodel:\n")
    flags = {"train.seed": 2, "train.max_steps": 2, "device": None, "data.train": ["a"]}
    words = ["train.seed=3", "model.hidden_size=64", "train.learning_rate=3e-4"]
    recipe = load_recipe(PretrainRecipe, str(path), flags, words)
    assert (recipe.train.seed, recipe.train.max_steps, recipe.train.threads) == (3, 2, 1)
    assert recipe.model is not None and recipe.model.hidden_size == 64
    assert recipe.train.learning_rate == 3e-4
    assert recipe.data.train == ["a"]
    assert recipe.device == "auto"


def test_a_recipe_of_another_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stage: eval")
    with pytest.raises(UserError) as caught:
        load_recipe(PretrainRecipe, str(path), {}, [])
    assert caught.value.message == f"{path}: this recipe is for stage `eval`, not `pretrain`"
    assert caught.value.hint == "run `llmctl eval`"


@pytest.mark.parametrize(
    ("word", "is_one"),
    [
        ("a=1", True),
        ("train.max_steps=", True),
        ("a_b.c2=x=y", True),
        ("a=two\nlines", True),
        ("runs/a=1", False),
        ("./a=1", False),
        ("A=1", False),
        ("=1", False),
        ("a.=1", False),
        ("a b=1", False),
        ("plain", False),
    ],
)
def test_what_is_an_override(word: str, is_one: bool) -> None:
    assert is_override(word) is is_one


# --- there and back ---------------------------------------------------------------------------------

FILLED = """\
stage: pretrain
out: "2024"
tokenizer: "true"
model:
  num_key_value_heads: 2
  pattern: [full, sliding]
  sliding_window: 8
  rope_parameters: {rope_type: llama3, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192}
data: {train: ["a: b", "- c", "#d", "é你"]}
train: {learning_rate: 3e-4, adam_epsilon: 1.0e-12, seed: 4123456789}
"""


def back(recipe: StageRecipe, folder: Path) -> StageRecipe:
    path = folder / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return check_file(path)


@pytest.mark.parametrize("stage", list(RECIPES))
def test_defaults_survive_a_dump(stage: str, tmp_path: Path) -> None:
    assert back(RECIPES[stage](), tmp_path) == RECIPES[stage]()


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_survive_a_dump(name: str, tmp_path: Path) -> None:
    recipe = check_file(find_recipe(name))
    assert back(recipe, tmp_path) == recipe


def test_everything_set_survives_a_dump(tmp_path: Path) -> None:
    path = tmp_path / "filled.yaml"
    path.write_text(FILLED, encoding="utf-8")
    recipe = check_file(path)
    again = back(recipe, tmp_path)
    assert again == recipe
    # a dump writes every default out: another default later cannot change an old run
    assert "adam_beta1" in dump_recipe(PretrainRecipe())


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
LOOKS_LIKE_MORE = st.text(alphabet="0123456789eE+-._:~#'\"\\ ynotrufalse\n\t\x85\u2028😀", max_size=8)


@given(ANY_TEXT | LOOKS_LIKE_MORE)
@example("3e-4")
@example("yes")
@example("\x85\U0001f600")
def test_any_text_survives(text: str) -> None:
    recipe = PretrainRecipe.model_validate({"out": text, "data": {"train": [text, text]}})
    for written in (dump_recipe(recipe), annotated(recipe)):
        assert PretrainRecipe.model_validate(parse_yaml(written, "test")) == recipe


@given(st.floats(min_value=0, exclude_min=True, max_value=10))
def test_any_number_survives(rate: float) -> None:
    recipe = PretrainRecipe.model_validate({"train": {"learning_rate": rate}})
    for written in (dump_recipe(recipe), annotated(recipe)):
        assert PretrainRecipe.model_validate(parse_yaml(written, "test")) == recipe
