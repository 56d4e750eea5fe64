"""`model.experts`: several feed-forward layers in the place of one, and how tokens are shared among them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmctl.recipe.base import Section, about
from llmctl.recipe.ranges import MOST_FACTOR, MOST_INNER, MOST_LAYERS, MOST_PARTS, MOST_RATE

_AT = "model.experts."


class _Experts(Section):
    """What all kinds share."""

    num_experts: int = about(_AT + "num_experts", 8, gt=1, le=MOST_PARTS)
    moe_intermediate_size: int | None = about(_AT + "moe_intermediate_size", None, gt=0, le=MOST_INNER)
    n_shared_experts: int = about(_AT + "n_shared_experts", 0, ge=0, le=MOST_PARTS)
    first_k_dense_replace: int = about(_AT + "first_k_dense_replace", 0, ge=0, le=MOST_LAYERS)


class SparseExperts(_Experts):
    """Each token goes to its best experts only (Shazeer et al. 2017, arXiv:1701.06538); shared ones as in DeepSeekMoE (arXiv:2401.06066)."""

    kind: Literal["sparse"] = about(_AT + "kind")
    num_experts_per_tok: int = about(_AT + "num_experts_per_tok", 2, gt=0, le=MOST_PARTS)
    scoring_func: Literal["softmax", "sigmoid"] = about(_AT + "scoring_func", "softmax")
    norm_topk_prob: bool = about(_AT + "norm_topk_prob", True)
    routed_scaling_factor: float = about(_AT + "routed_scaling_factor", 1.0, gt=0, le=MOST_FACTOR)
    n_group: int = about(_AT + "n_group", 1, gt=0, le=MOST_PARTS)
    topk_group: int = about(_AT + "topk_group", 1, gt=0, le=MOST_PARTS)
    noisy: bool = about(_AT + "noisy", False)
    correction_bias: bool = about(_AT + "correction_bias", False)
    bias_update_rate: float = about(_AT + "bias_update_rate", 0.001, ge=0, le=MOST_RATE)
    router_aux_loss_coef: float = about(_AT + "router_aux_loss_coef", 0.001, ge=0, le=MOST_FACTOR)
    router_z_loss_coef: float = about(_AT + "router_z_loss_coef", 0.0, ge=0, le=MOST_FACTOR)


class DenseExperts(_Experts):
    """Each token goes to all experts, weighted by a softmax (Jacobs et al. 1991)."""

    kind: Literal["dense"] = about(_AT + "kind")


class SoftExperts(_Experts):
    """The experts' parameters are averaged by the router and one layer is computed (SMEAR, Muqeeth et al. 2023, arXiv:2306.03745)."""

    kind: Literal["soft"] = about(_AT + "kind")
    routing: Literal["token", "sequence"] = about(_AT + "routing", "token")


class SlotExperts(_Experts):
    """Experts work on slots, which are averages of all tokens (Puigcerver et al. 2023, arXiv:2308.00951); encoders only."""

    kind: Literal["slots"] = about(_AT + "kind")
    slots_per_expert: int = about(_AT + "slots_per_expert", 1, gt=0, le=MOST_PARTS)


class ExpertChoice(_Experts):
    """Each expert takes its best tokens (Zhou et al. 2022, arXiv:2202.09368); encoders only."""

    kind: Literal["expert_choice"] = about(_AT + "kind")
    capacity_factor: float = about(_AT + "capacity_factor", 2.0, gt=0, le=MOST_FACTOR)


Experts = Annotated[
    SparseExperts | DenseExperts | SoftExperts | SlotExperts | ExpertChoice, Field(discriminator="kind")
]


def looks_ahead(experts: _Experts | None) -> str | None:
    """Why a kind of experts lets a token depend on later ones, or None if it does not."""
    if isinstance(experts, SlotExperts):
        return "slots are averages over all tokens of a document"
    if isinstance(experts, ExpertChoice):
        return "an expert chooses among all tokens of a document"
    if isinstance(experts, SoftExperts) and experts.routing == "sequence":
        return "parameters are averaged by all tokens of a document"
    return None
