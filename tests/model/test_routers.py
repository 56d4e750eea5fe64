"""Routers against those of transformers, their losses, and balance without a loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from llmctl.model.context import padded_context, plain_context
from llmctl.model.routers import SparseRouter, balance_experts
from llmctl.recipe.experts import SparseExperts
from tests.model.expert_cases import E, X, layer_of


def router_of(**fields: object) -> SparseRouter:
    torch.manual_seed(1)
    router = SparseRouter(SparseExperts(kind="sparse", num_experts=8, **fields), E)
    nn.init.normal_(router.weight, std=0.5)
    return router


SHAPE = {"hidden_size": E, "num_experts_per_tok": 3}
SAME = {
    "mixtral": (MixtralTopKRouter, MixtralConfig(num_local_experts=8, **SHAPE), {}),
    "qwen3_moe": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(num_experts=8, norm_topk_prob=False, **SHAPE),
        {"norm_topk_prob": False},
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config(n_routed_experts=8, n_group=4, topk_group=2, routed_scaling_factor=2.5, **SHAPE),
        {
            "scoring_func": "sigmoid",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "correction_bias": True,
        },
    ),
}


@pytest.mark.parametrize("family", SAME)
@torch.no_grad()
def test_routers_are_those_of_transformers(family: str) -> None:
    make, config, fields = SAME[family]
    ours, theirs = router_of(num_experts_per_tok=3, **fields), make(config)
    theirs.weight.copy_(ours.weight)
    if ours.e_score_correction_bias is not None:
        ours.e_score_correction_bias.normal_(std=0.3)
        theirs.e_score_correction_bias.copy_(ours.e_score_correction_bias)
    x = torch.randn(200, E)
    choice, routing = ours(x)
    logits, weights, experts = theirs(x)
    order, their_order = choice.experts.argsort(-1), experts.argsort(-1)
    assert torch.equal(choice.experts.gather(1, order), experts.gather(1, their_order))
    torch.testing.assert_close(choice.weights.gather(1, order), weights.gather(1, their_order))
    torch.testing.assert_close(routing.logits, logits)


@torch.no_grad()
def test_balance_loss_is_that_of_transformers() -> None:
    layer = layer_of("sparse")
    x = torch.randn(3, 7, E)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    logits = layer.gate(x.flatten(0, 1))[1].logits
    for context, attention_mask in [(plain_context(7), None), (padded_context(mask, 7), mask)]:
        ours = layer(x, context)[1].balance
        torch.testing.assert_close(ours, load_balancing_loss_func((logits,), X, 2, attention_mask))


@torch.no_grad()
def test_losses_of_known_routings() -> None:
    router = router_of(num_experts_per_tok=2)
    router.weight.zero_()
    routing = router(torch.randn(5, E))[1]
    # even shares: K whoever is chosen; logits of 0: log(X)²
    torch.testing.assert_close(routing.balance, torch.tensor(2.0))
    torch.testing.assert_close(routing.z, torch.tensor(math.log(8) ** 2))
    router.weight[:2] = 100.0
    routing = router(torch.ones(5, E))[1]
    torch.testing.assert_close(routing.balance, torch.tensor(8.0))
    assert layer_of("dense")(torch.randn(1, 4, E), plain_context(4))[1].balance == 0


def test_sigmoid_shares_sum_to_one() -> None:
    shares = router_of(scoring_func="sigmoid")(torch.randn(5, E))[1].shares
    torch.testing.assert_close(shares.sum(-1), torch.ones(5))


@torch.no_grad()
def test_noise_is_for_training_only() -> None:
    router, x = router_of(noisy=True), torch.randn(50, E)
    assert dict(router.named_parameters()).keys() == {"weight", "noise.weight"}
    plain = x @ router.weight.T
    torch.testing.assert_close(router.eval()(x)[1].logits, plain)
    router.train()
    router.noise.weight.zero_()
    drawn = torch.cat([router(x)[1].logits - plain for _ in range(50)])
    # softplus(0) = log 2
    assert abs(float(drawn.std()) - math.log(2)) < 0.02
    assert abs(float(drawn.mean())) < 0.02


def test_routers_compute_in_float32_whatever_the_model_does() -> None:
    router, x = router_of(), torch.randn(20, E)
    wanted = F.linear(x, router.weight)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router(x)[1].logits, wanted)
    layer = layer_of("sparse").bfloat16()
    y, routing = layer(x.bfloat16()[None], plain_context(20))
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32
    exact = F.linear(x.bfloat16().float(), layer.gate.weight.float())
    torch.testing.assert_close(routing.logits, exact)


# --- balance without a loss -------------------------------------------------------------------------


def test_balance_experts_evens_out_a_skewed_router() -> None:
    router = router_of(scoring_func="sigmoid", correction_bias=True, bias_update_rate=0.01).train()
    x = torch.randn(400, E) + 0.5
    with torch.no_grad():
        router.weight[0] += 0.5
    before = router(x)[1]
    for _ in range(300):
        router(x)
        balance_experts(router)
    after = router(x)[1]
    mean = before.load.float().mean()
    assert before.load.max() > 2.0 * mean
    assert (after.load - mean).abs().max() < 0.15 * mean
    # it chooses and does not weigh
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.shares, before.shares)


def test_a_bias_moves_by_the_rate_and_the_counts_begin_anew() -> None:
    router = router_of(num_experts_per_tok=1, correction_bias=True, bias_update_rate=0.25).train()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[3] = 1.0
    router(torch.ones(6, E))
    balance_experts(router)
    wanted = torch.full((8,), 0.25)
    wanted[3] = -0.25
    assert torch.equal(router.e_score_correction_bias, wanted)
    balance_experts(router)
    assert torch.equal(router.e_score_correction_bias, wanted)


def test_only_training_with_gradients_counts() -> None:
    router = router_of(correction_bias=True)
    router.eval()(torch.randn(4, E))
    with torch.no_grad():
        router.train()(torch.randn(4, E))
    balance_experts(router)
    assert not router.e_score_correction_bias.any()
    assert router.counts is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bias(reentrant: bool) -> None:
    x = torch.randn(1, 30, E)
    moved = []
    for call in (
        lambda layer, x, ctx: layer(x, ctx)[0],
        lambda *given: checkpoint(_first, *given, use_reentrant=reentrant),
    ):
        layer = layer_of("sparse-sigmoid-groups").train()
        call(layer, x.clone().requires_grad_(), plain_context(30)).sum().backward()
        balance_experts(layer)
        moved.append(layer.gate.e_score_correction_bias)
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], layer_of("sparse-sigmoid-groups").gate.e_score_correction_bias)


def _first(layer: nn.Module, x: Tensor, ctx: object) -> Tensor:
    return layer(x, ctx)[0]


def test_the_bias_is_saved_and_stays_float32() -> None:
    router = router_of(correction_bias=True).train()
    router(torch.randn(5, E))
    router.e_score_correction_bias.fill_(0.501)
    assert router.state_dict().keys() == {"weight", "e_score_correction_bias"}
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.e_score_correction_bias, torch.full((8,), 0.501))
    with torch.device("meta"):
        empty = router_of(correction_bias=True)
    empty.bfloat16().to_empty(device="cpu")
    assert empty.e_score_correction_bias.dtype == torch.float32
    assert empty.e_score_correction_bias.device.type == "cpu"
