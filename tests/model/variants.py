"""Decoders of every entry of every table, and of the combinations that meet inside a block.

`SINGLE` has one variant an entry, next to what it cannot do without. `CROSSED` crosses the ways of mixing
tokens with positions and feed-forward parts, because those hand each other masks, states and documents.
"""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import torch

from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import new_model
from llmctl.model.ffn import FFNS
from llmctl.model.norms import NORMS
from llmctl.model.positions import POSITIONS
from llmctl.recipe import model as vocabulary
from llmctl.recipe.model import ModelSection

WINDOW = 6
LENGTH = 3 * WINDOW + 2
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
Variant = dict[str, Any]

ROPES: dict[str, Variant] = {
    "linear": {"factor": 2.0},
    "ntk": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
# a kind of layer with its sizes; each name of the vocabulary is in one of them
LAYERS: dict[str, Variant] = {
    "full": {},
    "sliding": {"pattern": ["sliding"], "sliding_window": WINDOW},
    "band": {"pattern": ["band"], "sliding_window": WINDOW},
    "dilated": {"pattern": ["dilated"], "sliding_window": 3, "dilation": 2},
    "global": {"pattern": ["global"], "num_global_tokens": 2},
    "random": {"pattern": ["random"], "num_random_blocks": 1, "block_size": 3},
    "block": {"pattern": ["block"], "block_size": 4},
    "routing": {"pattern": ["routing"], "routing": {"num_clusters": 3, "chunk_size": 4}},
    "lsh": {"pattern": ["lsh"], "lsh": {"num_buckets": 4, "num_hashes": 2, "chunk_size": 4}},
    "mamba2": {"pattern": ["mamba2"], "ssm": {"state_size": 8, "head_dim": 16, "chunk_size": 4}},
}
MIXTURES: dict[str, Variant] = {
    "longformer": {"pattern": ["band+global"], "sliding_window": 4, "num_global_tokens": 1},
    "bigbird": {
        "pattern": ["band+global+random"],
        "sliding_window": 4,
        "num_global_tokens": 2,
        "num_random_blocks": 1,
        "block_size": 2,
    },
    "tiled": {"pattern": ["sliding", "full"], "sliding_window": WINDOW},
    "attention-and-state": {"pattern": ["mamba2", "full"], "ssm": LAYERS["mamba2"]["ssm"]},
    "content-and-local": {
        "pattern": ["sliding", "routing"],
        "sliding_window": WINDOW,
        "routing": LAYERS["routing"]["routing"],
    },
}
MLA: Variant = {
    "attention": "mla",
    "mla": {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8},
}
_FEW: Variant = {"num_experts": 4, "moe_intermediate_size": 24}
EXPERTS: dict[str, Variant] = {
    "sparse": {"kind": "sparse", **_FEW},
    "sparse-shared-sigmoid": {
        "kind": "sparse",
        **_FEW,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "n_group": 2,
        "correction_bias": True,
        "routed_scaling_factor": 2.0,
        "first_k_dense_replace": 1,
    },
    "sparse-noisy": {"kind": "sparse", **_FEW, "noisy": True, "router_z_loss_coef": 0.01},
    "dense": {"kind": "dense", **_FEW},
    "soft": {"kind": "soft", **_FEW},
}


def _single() -> dict[str, Variant]:
    found: dict[str, Variant] = {
        "mqa": {"num_key_value_heads": 1},
        "gqa-untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
        "qk-norm-wide": {"qk_norm": True, "head_dim": 12},
        "biases": {"attention_bias": "all", "mlp_bias": True},
        "qkv-bias": {"attention_bias": "qkv"},
        "mla": MLA,
        "mla-low-rank-queries": MLA | {"mla": MLA["mla"] | {"q_lora_rank": 10}},
        "soft-caps": {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 3.0,
        },
        "multipliers": {"embedding_multiplier": 2.0, "logits_scaling": 4.0},
        "embedding-norm": {"embedding_norm": True, "norm": "layernorm"},
        "types": {"type_vocab_size": 2},
    }
    for norm, placement in product(NORMS, get_args(vocabulary.NormPlacement)):
        found[f"{norm}-{placement}"] = {"norm": norm, "norm_placement": placement}
    found |= {f"position-{kind}": {"position": kind} for kind in POSITIONS}
    found |= {
        f"rope-{kind}": {"rope_parameters": {"rope_type": kind, **more}} for kind, more in ROPES.items()
    }
    found |= {f"layer-{kind}": layer for kind, layer in (LAYERS | MIXTURES).items()}
    found |= {f"ffn-{kind}": {"ffn": kind} for kind in FFNS}
    found["ffn-none"] = LAYERS["mamba2"] | {"ffn": "none"}
    return found | {f"experts-{kind}": {"experts": experts} for kind, experts in EXPERTS.items()}


def _crossed() -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    parts: dict[str, Variant] = {"swiglu": {}} | {k: {"experts": v} for k, v in EXPERTS.items()}
    mixers = LAYERS | MIXTURES | {"mla": MLA}
    for (mixer, layer), position, (part, more) in product(mixers.items(), POSITIONS, parts.items()):
        if not goes_together(mixer, position):
            continue
        found[f"{mixer}-{position}-{part}"] = layer | {"position": position} | more
    return found


def goes_together(mixer: str, position: str) -> bool:
    """What the recipe check refuses: a rotary key without rope, and a score bias where buckets are sorted."""
    if mixer == "mla":
        return position == "rope"
    return position not in ("relative", "alibi") or mixer not in WITHOUT_BIAS


WITHOUT_BIAS = ("routing", "lsh", "content-and-local", "mamba2")
SINGLE = _single()
CROSSED = {name: variant for name, variant in _crossed().items() if name not in SINGLE}
VARIANTS = SINGLE | CROSSED


def make(variant: Variant) -> LlmctlForCausalLM:
    """A small model whose norms, biases and buffers are not what they begin as."""
    torch.manual_seed(0)
    model = new_model(ModelSection(**(SIZES | variant)), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Random token ids, the same at each call."""
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))
