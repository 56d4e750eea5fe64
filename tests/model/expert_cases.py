"""A layer of experts of every kind, small, for the tests of layers, routers and sizes."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.model.experts import EXPERTS
from llmctl.recipe.model import ModelSection

E, INNER, X = 16, 24, 6
CAUSAL = {
    "sparse": {"kind": "sparse"},
    "sparse-unnormalised": {"kind": "sparse", "norm_topk_prob": False, "num_experts_per_tok": 3},
    "sparse-sigmoid-groups": {
        "kind": "sparse",
        "scoring_func": "sigmoid",
        "n_group": 3,
        "topk_group": 2,
        "correction_bias": True,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 2,
    },
    "dense": {"kind": "dense", "n_shared_experts": 1},
    "soft-token": {"kind": "soft"},
}
LOOKING = {
    "soft-sequence": {"kind": "soft", "routing": "sequence"},
    "slots": {"kind": "slots", "slots_per_expert": 2, "n_shared_experts": 1},
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 1.5},
}
KINDS = CAUSAL | LOOKING


def section(experts: dict[str, object], **fields: object) -> ModelSection:
    given = {"hidden_size": E, "intermediate_size": 40, "num_attention_heads": 2, "vocab_size": 32}
    given |= {"stack": "encoder", "experts": {"num_experts": X, "moe_intermediate_size": INNER} | experts}
    return ModelSection.model_validate(given | fields).resolved()


def layer_of(name: str, **fields: object) -> nn.Module:
    """A layer with weights and a bias of the router that make a difference."""
    torch.manual_seed(0)
    model = section(KINDS[name], **fields)
    layer = EXPERTS[model.experts.kind](model)
    nn.init.normal_(layer.gate.weight, std=0.5)
    if getattr(layer.gate, "e_score_correction_bias", None) is not None:
        nn.init.normal_(layer.gate.e_score_correction_bias, std=0.3)
    return layer.eval()
