"""What `sft --dry-run` says of the weights' memory, against the bytes of the model that is then trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmctl.model.checkpoint import new_model, save_model
from llmctl.recipe.load import load_recipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.tune import SftRecipe
from llmctl.stages.tune import prepare_base, tuned
from llmctl.talk import SILENT
from tests.program import Program
from tests.stages.conftest import FEW, TUNE, VOCABULARY


def bytes_of(model: torch.nn.Module) -> int:
    """Of all parameters, and of the scales of those in four bits."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        state = getattr(weight, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            total += state.state2.absmax.numel() * 4
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "float32"), ("lora", "bfloat16"), ("qlora", "bfloat16"), ("full", "float32")],
)
def test_planned_weights_are_those_that_are_held(
    method: str, dtype: str, tied: bool, talking: Path, llmctl: Program
) -> None:
    wide = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    spec = ModelSection(
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=tied, **wide
    ).resolved()
    save_model(new_model(spec, 0), talking / "wide")
    for file in (talking / "base").glob("*token*"):
        (talking / "wide" / file.name).write_bytes(file.read_bytes())
    given = [f"method={method}", f"train.dtype={dtype}", *(["lora.r=16"] if method == "full" else [])]
    ended = llmctl("sft", "wide", *TUNE[2:], *given, "data.overlong=drop", "--dry-run", "--json")
    assert ended.code == 0, ended.err
    planned = json.loads(ended.out)
    recipe = load_recipe(SftRecipe, None, {"base": "wide"}, [*FEW, *given]).resolved()
    base = prepare_base("wide", device="cpu", dtype=dtype, template="auto", max_length=None, talk=SILENT)
    held = tuned(base, recipe.method, recipe.lora, 0, False).model
    assert planned["memory_bytes"]["weights"] == pytest.approx(bytes_of(held), rel=0.01)
    assert planned["trained_parameters"] == sum(one.numel() for one in held.parameters() if one.requires_grad)
