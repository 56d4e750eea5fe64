"""The sizes of a layer of experts against the layer itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmctl.model.context import plain_context
from llmctl.model.experts import EXPERTS
from llmctl.plan.experts import expert_parameters
from tests.model.expert_cases import INNER, KINDS, E, X, section

SIZES = KINDS | {"sparse-noisy": {"kind": "sparse", "noisy": True, "n_shared_experts": 2}}


@pytest.mark.parametrize("fields", [{}, {"ffn": "relu2", "mlp_bias": True}], ids=["swiglu", "relu2-biases"])
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_as_planned(name: str, fields: dict[str, object]) -> None:
    model = section(SIZES[name], **fields)
    layer = EXPERTS[model.experts.kind](model)
    assert sum(weight.numel() for weight in layer.parameters()) == expert_parameters(model)[0]


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_active_parameters_are_the_products_of_a_token(name: str) -> None:
    model = section(SIZES[name])
    layer, length = EXPERTS[model.experts.kind](model).eval(), 24
    with FlopCounterMode(display=False) as counted:
        layer(torch.randn(1, length, E), plain_context(length))
    total = counted.get_total_flops()
    if name == "soft-sequence":
        total -= 2 * X * 3 * E * INNER  # the averaging, once a document
    assert total == 2 * length * expert_parameters(model, length)[1]
