"""Every field of every recipe, given what no one would write."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import strategies as st

from llmctl.recipe.load import check_file, dump_recipe, load_recipe
from llmctl.recipe.schema import RECIPES
from llmctl.recipe.yaml import dump_yaml
from tests.fuzz.strategies import RAW, WILD, damaged, leaves, recipes, written


@pytest.mark.parametrize("stage", RECIPES)
def test_a_recipe_file(fuzz, tmp_path, stage):
    path = tmp_path / "recipe.yaml"

    def read(found: tuple[dict[str, Any], list[str]]) -> None:
        path.write_text(written(found[0]))
        checked = check_file(path)
        path.write_text(dump_recipe(checked))
        assert check_file(path) == checked

    ended = fuzz(recipes(stage), read, 12)
    assert ended["read"] and ended["refused"]


def test_any_bytes_of_a_recipe_file(fuzz, tmp_path):
    path = tmp_path / "recipe.yaml"
    whole = "".join(
        f"# {stage}\n" + dump_recipe(RECIPES[stage].model_validate({})) for stage in ("pretrain",)
    ).encode()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        check_file(path)

    fuzz(damaged(whole), read, 40)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "quantize"])
def test_words_of_the_command_line(fuzz, stage):
    fields = sorted(leaves(stage))
    texts = st.one_of(
        WILD.map(written),
        st.text(max_size=12),
        st.sampled_from(
            [
                "!!timestamp 2020-99-99",
                "!!float x",
                "!!bool x",
                "&a [*a]",
                "<<: 1",
                "\udcff",
                ".nan",
                "1_0e9",
                *RAW.values(),
            ]
        ),
    )

    def read(found: tuple[str, str]) -> None:
        load_recipe(RECIPES[stage], None, {}, [f"{found[0]}={found[1]}"])

    fuzz(st.tuples(st.sampled_from([*fields, "model", "x", "data.x.y"]), texts), read, 40)


def test_yaml_that_stands_for_more_than_it_says(fuzz, tmp_path):
    path = tmp_path / "recipe.yaml"

    def read(found: tuple[int, int]) -> None:
        width, depth = found
        lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
        path.write_text("stage: pretrain\n" + "\n".join(lines))
        check_file(path)

    fuzz(st.tuples(st.integers(1, 12), st.integers(1, 60)), read, 10)


@pytest.mark.parametrize("stage", RECIPES)
def test_every_number_has_a_range(stage):
    """So that the schema, the reference and editors show it, and `recipe check` refuses what no library could use."""
    for name, schemas in leaves(stage).items():
        for one in schemas:
            if one.get("type") in ("integer", "number") and "const" not in one and "enum" not in one:
                low = one.get("minimum", one.get("exclusiveMinimum"))
                high = one.get("maximum", one.get("exclusiveMaximum"))
                assert low is not None and high is not None, f"{stage}: {name}"
                assert math.isfinite(high) and high <= 1e15, f"{stage}: {name}"


def test_what_is_dumped_is_small():
    assert len(dump_yaml({"a": [1, 2]})) < 20
