"""The size of a model: the formula ends in the planner's number, and a recipe needs no weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmctl.plan.size import kv_cache_bytes
from llmctl.recipe.model import ModelSection
from llmctl.stages.size import cache_formula, run
from tests.program import Program

MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "mixed": {"pattern": ["full", "sliding"], "sliding_window": 6},
    "routing": {"pattern": ["routing", "full"], "routing": {}},
    "lsh": {"pattern": ["lsh"], "lsh": {}, "num_key_value_heads": 2},
    "mla": {"attention": "mla", "mla": MLA},
    "mamba2": {"pattern": ["mamba2", "mamba2", "full"], "num_hidden_layers": 6, "ssm": {}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_gives_its_result(kind: str) -> None:
    spec = ModelSection(vocab_size=97, **KINDS[kind]).resolved()
    text = cache_formula(spec, 300, 2)
    terms, _, result = text.partition(" = ")
    assert int(result.replace(",", "")) == kv_cache_bytes(spec, 300, 2)
    # what is left without the words is arithmetic
    sums = re.sub(
        r"[a-z]\w*", "", re.sub(r"\(keys and values\)|, however many the tokens|(?<=\d),(?=\d)", "", terms)
    )
    assert eval(sums.replace("×", "*")) == kv_cache_bytes(spec, 300, 2)


def test_experts_that_rest_are_not_active() -> None:
    spec = ModelSection(vocab_size=97, experts={"kind": "sparse"}).resolved()  # type: ignore[arg-type]
    found = run(spec, 10)
    assert found["parameters"]["active"] < found["parameters"]["total"]
    assert found["tokens"] == 10


def test_a_model_and_the_recipe_it_was_made_by_have_one_size(stocked: Path, llmctl: Program) -> None:
    (model, recipe) = (
        json.loads(llmctl("explain", name, "--size", "--json").out) for name in ("base", "base/recipe.yaml")
    )
    kept = ("parameters", "bytes", "kv_cache", "flops_per_token", "tokens")
    assert {name: model[name] for name in kept} == {name: recipe[name] for name in kept}
    assert model["bytes"]["float32"] == 4 * model["parameters"]["total"]
    held = sum(f.stat().st_size for f in (stocked / "base").glob("*.safetensors"))
    assert 0 < held - model["bytes"]["float32"] < 4096  # the header


def test_what_is_printed(stocked: Path, llmctl: Program) -> None:
    out = llmctl("explain", "pretrain-5m", "--size", "tokenizer=tok", "--tokens", "100").out
    assert "6 layers × 2 (keys and values) × 4 heads × 64 channels × 100 tokens × 2 bytes = 614,400" in out
    assert "600 KiB; 1.2 MiB in float32" in out
    assert re.search(r"^all +4,\d{3},\d{3} +100.0%$", out, re.MULTILINE)
