"""Recipes that no one means: what `recipe check` says of them."""

from __future__ import annotations

import pytest

from llmctl.errors import UserError
from llmctl.recipe.load import check_file

BAD = {
    "model: " + "[" * 2000 + "]" * 2000: ("nested too deeply", "no recipe has more than 50 levels"),
    "train: {seed: " + "9" * 5000 + "}": (
        "line 2: a number of 5,000 digits",
        "no field takes so large a number",
    ),
    "train: {seed: !!timestamp 2020-13-45}": (
        "a value does not fit its tag (month must be in 1..12)",
        "leave out tags such as !!float",
    ),
    "train: {seed: !!bool foo}": ("a value does not fit its tag ('foo')", "leave out tags such as !!float"),
    'out: "a\\0b"': (
        "out: holds the character '\\x00', which is no text",
        "take it out; names of files must be UTF-8",
    ),
    'out: "a\\udc80"': (
        "out: holds the character '\\udc80', which is no text",
        "take it out; names of files must be UTF-8",
    ),
    "train: {num_train_epochs: 1e300}": (
        "train.num_train_epochs: should be less than or equal to 100000, not 1e+300",
        "`llmctl recipe show pretrain` explains train.num_train_epochs",
    ),
    "train: {seed: 99999999999999999999}": (
        "train.seed: should be less than or equal to 4294967295, not 99999999999999999999",
        "`llmctl recipe show pretrain` explains train.seed",
    ),
    "a: &a [" + "x, " * 999 + "x]\nb: &b [" + "*a, " * 99 + "*a]\nc: [*b, *b]": (
        "more than 100,000 values",
        "a recipe has some dozens",
    ),
}


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_recipe_beyond_reason(tmp_path, number):
    text, (message, hint) = list(BAD.items())[number]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: pretrain\n{text}\n")
    with pytest.raises(UserError) as caught:
        check_file(path)
    assert caught.value.message == f"{path}: {message}"
    assert caught.value.hint == hint
