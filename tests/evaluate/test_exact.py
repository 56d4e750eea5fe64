"""Exact completion by one forward pass, against decoding token by token."""

from __future__ import annotations

import pytest
import torch

from llmctl.engine.generate import generate
from llmctl.evaluate.exact import exact_matches
from llmctl.kernels.device import Compute
from llmctl.model.checkpoint import new_model
from llmctl.recipe.model import ModelSection

FLOAT = Compute(torch.device("cpu"), torch.float32)


def test_agrees_with_decoding():
    model = new_model(
        ModelSection(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2), 0
    ).eval()
    random = torch.Generator().manual_seed(0)
    pairs, expected = [], []
    for number in range(12):
        prompt = torch.randint(0, 31, (3 + number,), generator=random).tolist()
        said = list(generate(model, prompt, 4, lambda logits: logits.argmax(-1)))
        wrong = [*said[:3], (said[3] + 1) % 31]
        pairs += [(prompt, said), (prompt, wrong)]
        expected += [True, False]
    assert exact_matches(model, pairs, FLOAT, batch_size=5) == expected


def test_nothing_to_complete_is_a_programmers_error():
    with pytest.raises(ValueError, match="needs a prompt and a completion"):
        exact_matches(None, [([1], [])], FLOAT)
