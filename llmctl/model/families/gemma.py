"""Gemma 2: norms on both sides of each sublayer, embeddings scaled by √E, and capped scores and logits.

transformers scales in its embedding layer, the core after it, so `inputs_embeds` of either are what its own
embedding layer gives; both round √E to the precision of the embeddings.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.llama import write_bias
from llmctl.model.families.row import (
    LLAMA_SIZES,
    Family,
    Inexpressible,
    read_layer_types,
    write_layer_types,
)
from llmctl.model.keymap import Rename, Rule
from llmctl.recipe.model import ModelSection

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise Inexpressible("use_bidirectional_attention: true")
    return {
        "attention_bias": "all" if config.attention_bias else "none",
        "embedding_multiplier": math.sqrt(config.hidden_size),
        "query_pre_attn_scalar": float(config.query_pre_attn_scalar),
        **read_layer_types(config),
    }


def _write(spec: ModelSection) -> dict[str, Any]:
    if not math.isclose(spec.embedding_multiplier, math.sqrt(spec.hidden_size)):
        raise Inexpressible(f"embedding_multiplier: {spec.embedding_multiplier}, not √hidden_size")
    if spec.hidden_size % spec.num_attention_heads:
        raise Inexpressible(f"hidden_size {spec.hidden_size} with {spec.num_attention_heads} heads")
    scalar = spec.query_pre_attn_scalar or spec.head_dim
    assert scalar is not None
    if scalar != int(scalar):
        raise Inexpressible(f"query_pre_attn_scalar: {scalar}, not a whole number")
    window = {"sliding_window": spec.sliding_window} if spec.sliding_window else {}
    return {
        **write_bias(spec),
        "query_pre_attn_scalar": int(scalar),
        "layer_types": write_layer_types(spec),
        **window,
    }


def _rules(spec: ModelSection) -> tuple[Rule, ...]:
    layer = "model.layers.{i}."
    norms = {
        layer + "input_layernorm": layer + "input_layernorm",
        # Gemma's names say where a norm stands, Llama's what comes before it
        layer + "post_attention_layernorm": layer + "mixer_output_layernorm",
        layer + "pre_feedforward_layernorm": layer + "post_attention_layernorm",
        layer + "post_feedforward_layernorm": layer + "mlp_output_layernorm",
        "model.norm": "model.norm",
    }
    return tuple(Rename(f"{theirs}.weight", f"{ours}.shift") for theirs, ours in norms.items())


ROWS: dict[str, Family] = {
    "gemma2": Family(
        "Gemma2",
        sizes={**LLAMA_SIZES, **{name: name for name in _CAPS}},
        fixed={"norm": "rmsnorm1p", "norm_placement": "sandwich"},
        speaks=frozenset(
            {"attention_bias", "embedding_multiplier", "query_pre_attn_scalar", "pattern", "sliding_window"}
        ),
        acts={"gelu_pytorch_tanh": "geglu"},
        act_field="hidden_activation",
        read=_read,
        write=_write,
        rules=_rules,
    )
}
