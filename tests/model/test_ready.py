"""A model made ready for use computes what it did before."""

from __future__ import annotations

import pytest
import torch

from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.model.checkpoint import load_model
from llmctl.model.ready import PrepackedLinear, ready
from tests.model.cases import ids, theirs

FAMILIES = ["llama", "llama-tied-mha", "llama-mqa-biases", "qwen2", "qwen3-window-biases"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ready_changes_the_layout_and_nothing_else(tmp_path, family: str, dtype: torch.dtype) -> None:
    theirs(family, scale=1.5).save_pretrained(tmp_path)
    plain, made = (load_model(tmp_path, dtype) for _ in range(2))
    ready(made)
    layers = [layer for layer in made.modules() if isinstance(layer, PrepackedLinear)]
    assert len(layers) == 3 * 4 + 1  # three blocks: qkv, output, gate and up, down; and the head
    with torch.no_grad():
        a, b = plain(ids(2, 17)).logits.float(), made(ids(2, 17)).logits.float()
    assert float((a - b).norm() / a.norm()) < (1e-6 if dtype == torch.float32 else 2e-2)
    prompt = ids(1, 9)[0].tolist()
    said = [list(generate(model, prompt, 12, likeliest)) for model in (plain, made)]
    assert dtype != torch.float32 or said[0] == said[1]


def test_a_model_in_another_precision_is_left_as_it_is(tmp_path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float64)
    ready(model)
    assert not any(isinstance(layer, PrepackedLinear) for layer in model.modules())
