"""Sizes of one layer of experts, from its numbers alone. No torch."""

from __future__ import annotations

from llmctl.recipe.experts import ExpertChoice, SlotExperts, SoftExperts, SparseExperts
from llmctl.recipe.model import GATED, ModelSection


def ffn_parameters(model: ModelSection, inner: int) -> int:
    """Parameters of one feed-forward layer of this inner width; `inner` 0 is none."""
    if model.ffn == "none" or inner == 0:
        return 0
    into = 2 if model.ffn in GATED else 1
    bias = into * inner + model.hidden_size if model.mlp_bias else 0
    return (into + 1) * model.hidden_size * inner + bias


def expert_parameters(model: ModelSection, length: int | None = None) -> tuple[int, int]:
    """(all, active) parameters of one layer of experts, its router and shared experts included.

    Active are those that a token is multiplied with, on average: forward FLOPs of a token are 2 x active.
    The noise of a router, which only training computes, is not active; nor is the averaging of parameters
    by `soft` experts of a sequence, which costs 2 x num_experts FLOPs per parameter of an expert and document.

    Args:
        model: resolved, with experts.
        length: tokens of a document, which what `slots` costs depends on; max_position_embeddings when None.
    """
    experts = model.experts
    assert experts is not None
    count = experts.num_experts
    expert = ffn_parameters(model, model.intermediate_of_expert)
    shared = ffn_parameters(model, experts.n_shared_experts * model.intermediate_of_expert)
    router, noise, computed = count * model.hidden_size, 0, float(count)
    if isinstance(experts, SparseExperts):
        computed = experts.num_experts_per_tok
        noise = router if experts.noisy else 0
    elif isinstance(experts, SoftExperts) and experts.routing == "sequence":
        computed = 1
    elif isinstance(experts, ExpertChoice):
        computed = min(experts.capacity_factor, count)
    routing = router
    if isinstance(experts, SlotExperts):
        slots = count * experts.slots_per_expert
        router = slots * model.hidden_size
        computed = slots / (length or model.max_position_embeddings)
        routing = 3 * router  # a token is weighed, given to the slots, and read from them
    return count * expert + router + noise + shared, round(computed * expert) + routing + shared
