"""DeepSeek-V3: latent attention, a sigmoid router with groups and a bias that balances, shared experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.llama import write_bias
from llmctl.model.families.moe import read_router_losses, sparse_of, write_router_losses
from llmctl.model.families.row import LLAMA_SIZES, Family, Inexpressible
from llmctl.model.keymap import Rule, Unpair
from llmctl.recipe.mixers import MlaSection
from llmctl.recipe.model import ModelSection

_SIZES = {
    ours: theirs
    for ours, theirs in LLAMA_SIZES.items()
    if ours not in ("num_key_value_heads", "head_dim")  # both follow from the section `mla`
}
_EXPERTS = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "n_group": "n_group",
    "topk_group": "topk_group",
}


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    if not config.rope_interleave:
        raise Inexpressible("rope_interleave: false")
    if config.num_key_value_heads != config.num_attention_heads:
        raise Inexpressible(f"num_key_value_heads: {config.num_key_value_heads}")
    for name, wanted in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        if getattr(config, name, wanted) != wanted:
            raise Inexpressible(f"{name}: {getattr(config, name)}")
    return {
        "mla": {name: getattr(config, name) for name in MlaSection.model_fields},
        "attention_bias": "all" if config.attention_bias else "none",
        "experts": {
            "kind": "sparse",
            "scoring_func": "sigmoid",
            "correction_bias": True,
            **{ours: getattr(config, theirs) for ours, theirs in _EXPERTS.items()},
            **read_router_losses(config),
        },
    }


def _write(spec: ModelSection) -> dict[str, Any]:
    experts = sparse_of(spec, scoring_func="sigmoid", correction_bias=True)
    if not experts.n_shared_experts:
        raise Inexpressible("experts.n_shared_experts: 0")
    assert spec.mla is not None
    return {
        **write_bias(spec),
        **spec.mla.model_dump(),
        **{theirs: getattr(experts, ours) for ours, theirs in _EXPERTS.items()},
        "moe_intermediate_size": spec.intermediate_of_expert,
        "num_key_value_heads": spec.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        **write_router_losses(experts),
    }


def _rules(spec: ModelSection) -> tuple[Rule, ...]:
    mla = spec.mla
    assert mla is not None
    layer, rotary = "model.layers.{i}.self_attn.", mla.qk_rope_head_dim
    head, compressed = mla.qk_nope_head_dim + rotary, mla.kv_lora_rank + rotary
    widths = {
        ("q_proj.weight" if mla.q_lora_rank is None else "q_b_proj.weight"): head,
        "kv_a_proj_with_mqa.weight": compressed,
        "kv_a_proj_with_mqa.bias": compressed,
    }
    return tuple(Unpair(layer + name, layer + name, width, rotary) for name, width in widths.items())


ROWS: dict[str, Family] = {
    "deepseek_v3": Family(
        "DeepseekV3",
        sizes=_SIZES,
        fixed={"attention": "mla"},
        speaks=frozenset({"mla", "attention_bias", "experts", "num_key_value_heads", "head_dim"}),
        read=_read,
        write=_write,
        rules=_rules,
        stacked_experts=True,
    )
}
