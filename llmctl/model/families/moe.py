"""Llama with sparse experts: Mixtral, and Qwen3 with experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.llama import read_one_window, write_bias, write_one_window
from llmctl.model.families.row import Family, Inexpressible
from llmctl.model.keymap import Rename, Rule
from llmctl.recipe.experts import SparseExperts
from llmctl.recipe.model import ModelSection

# of training alone, under our own names where theirs has none: other programs pass over them
TRAINING = ("router_z_loss_coef", "bias_update_rate")


def read_router_losses(config: PreTrainedConfig) -> dict[str, Any]:
    """The weights of the routers' losses; transformers adds the first only where `output_router_logits` is set."""
    balances = getattr(
        config, "output_router_logits", False
    )  # DeepSeek's config has neither in every version
    balance = getattr(config, "router_aux_loss_coef", 0.0) if balances else 0.0
    more = {name: getattr(config, name) for name in TRAINING if getattr(config, name, None) is not None}
    return {"router_aux_loss_coef": float(balance)} | more


def write_router_losses(experts: SparseExperts) -> dict[str, Any]:
    """The inverse of `read_router_losses`."""
    defaults = SparseExperts(kind="sparse")
    return {
        "router_aux_loss_coef": experts.router_aux_loss_coef,
        "output_router_logits": experts.router_aux_loss_coef > 0,
        **{
            name: getattr(experts, name)
            for name in TRAINING
            if getattr(experts, name) != getattr(defaults, name)
        },
    }


def sparse_of(spec: ModelSection, **wanted: Any) -> SparseExperts:
    """The experts of a spec. Raises Inexpressible if they are of another kind or have other values than `wanted`."""
    experts = spec.experts
    if not isinstance(experts, SparseExperts):
        raise Inexpressible(f"experts: {experts.kind if experts else None}")
    for name, value in ({"noisy": False} | wanted).items():
        if getattr(experts, name) != value:
            raise Inexpressible(f"experts.{name}: {getattr(experts, name)}")
    return experts


# routing as Mixtral has it
_PLAIN = {
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "correction_bias": False,
    "n_shared_experts": 0,
}


def _read_mixtral(config: PreTrainedConfig) -> dict[str, Any]:
    if config.router_jitter_noise:
        raise Inexpressible(f"router_jitter_noise: {config.router_jitter_noise}")
    experts = {
        "kind": "sparse",
        "num_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        **read_router_losses(config),
    }
    return {"experts": experts, **read_one_window(config)}


def _write_mixtral(spec: ModelSection) -> dict[str, Any]:
    experts = sparse_of(spec, first_k_dense_replace=0, norm_topk_prob=True, **_PLAIN)
    return {
        "intermediate_size": spec.intermediate_of_expert,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        **write_router_losses(experts),
        **write_one_window(spec),
    }


def _mixtral_rules(spec: ModelSection) -> tuple[Rule, ...]:
    disk, core = "model.layers.{i}.block_sparse_moe.", "model.layers.{i}.mlp."
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return (
        Rename(disk + "gate.weight", core + "gate.weight"),
        *(
            Rename(f"{disk}experts.{{e}}.{theirs}.weight", f"{core}experts.{{e}}.{ours}.weight")
            for theirs, ours in names.items()
        ),
    )


def _read_qwen3_moe(config: PreTrainedConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    dense = [
        layer
        for layer in layers
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    ]
    if dense != list(layers)[: len(dense)] or len(dense) == len(layers):
        raise Inexpressible(
            f"mlp_only_layers {config.mlp_only_layers} with decoder_sparse_step {config.decoder_sparse_step}: "
            "only the first layers can be without experts"
        )
    experts = {
        "kind": "sparse",
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "first_k_dense_replace": len(dense),
        **read_router_losses(config),
    }
    return {
        "experts": experts,
        "attention_bias": "all" if config.attention_bias else "none",
        **read_one_window(config),
    }


def _write_qwen3_moe(spec: ModelSection) -> dict[str, Any]:
    experts = sparse_of(spec, **_PLAIN)
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "moe_intermediate_size": spec.intermediate_of_expert,
        "norm_topk_prob": experts.norm_topk_prob,
        "mlp_only_layers": list(range(experts.first_k_dense_replace)),
        "decoder_sparse_step": 1,
        "use_sliding_window": spec.sliding_window is not None,
        **write_router_losses(experts),
        **write_bias(spec),
        **write_one_window(spec),
    }


_SPEAKS = frozenset({"experts", "pattern", "sliding_window"})

ROWS: dict[str, Family] = {
    "mixtral": Family(
        "Mixtral",
        speaks=_SPEAKS,
        read=_read_mixtral,
        write=_write_mixtral,
        rules=_mixtral_rules,
        stacked_experts=True,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        fixed={"qk_norm": True},
        speaks=_SPEAKS | {"attention_bias"},
        read=_read_qwen3_moe,
        write=_write_qwen3_moe,
        stacked_experts=True,
    ),
}
