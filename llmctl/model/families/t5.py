"""T5: an encoder and a decoder whose scores carry a learned bias of the distance, and are not scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.row import Family, Inexpressible, require
from llmctl.model.keymap import Rename, Rule
from llmctl.recipe.model import GATED, ModelSection

SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    if config.is_decoder:
        raise Inexpressible("is_decoder: True")
    # what the config calls tied is whether version 1.1 is meant, whose head is its own and unscaled
    tied = config.scale_decoder_outputs
    return {
        "tie_word_embeddings": tied,
        "logits_scaling": math.sqrt(config.d_model) if tied else 1.0,
        "hidden_dropout": float(config.dropout_rate),
        "attention_dropout": float(config.dropout_rate),
    }


def _write(spec: ModelSection) -> dict[str, Any]:
    require(spec, num_key_value_heads=spec.num_attention_heads, attention_dropout=spec.hidden_dropout)
    scaling = math.sqrt(spec.hidden_size) if spec.tie_word_embeddings else 1.0
    if not math.isclose(spec.logits_scaling, scaling):
        raise Inexpressible(f"logits_scaling: {spec.logits_scaling}")
    return {"dropout_rate": spec.hidden_dropout, "tie_word_embeddings": spec.tie_word_embeddings}


def _say_whether_tied(spec: ModelSection, written: dict[str, Any]) -> None:
    # transformers 5 reads it and forgets to write it
    written["tie_word_embeddings"] = spec.tie_word_embeddings


_SELF = {
    "SelfAttention.q": "self_attn.q_proj",
    "SelfAttention.k": "self_attn.k_proj",
    "SelfAttention.v": "self_attn.v_proj",
    "SelfAttention.o": "self_attn.o_proj",
    "layer_norm": "input_layernorm",
}
_CROSS = {
    "EncDecAttention.q": "cross_attn.q_proj",
    "EncDecAttention.k": "cross_attn.k_proj",
    "EncDecAttention.v": "cross_attn.v_proj",
    "EncDecAttention.o": "cross_attn.o_proj",
    "layer_norm": "cross_layernorm",
}
_PLAIN = {
    "DenseReluDense.wi": "mlp.up_proj",
    "DenseReluDense.wo": "mlp.down_proj",
    "layer_norm": "post_attention_layernorm",
}
_GATED = {
    "DenseReluDense.wi_0": "mlp.gate_proj",
    "DenseReluDense.wi_1": "mlp.up_proj",
    "DenseReluDense.wo": "mlp.down_proj",
    "layer_norm": "post_attention_layernorm",
}


def _rules(spec: ModelSection) -> tuple[Rule, ...]:
    ffn = _GATED if spec.ffn in GATED else _PLAIN
    found = [Rename("shared.weight", "model.embed_tokens.weight")]
    for side, sublayers in (("encoder", (_SELF, ffn)), ("decoder", (_SELF, _CROSS, ffn))):
        found += [
            Rename(
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                f"model.{side}.positions.weight",
            ),
            Rename(f"{side}.final_layer_norm.weight", f"model.{side}.norm.weight"),
        ]
        found += [
            Rename(
                f"{side}.block.{{i}}.layer.{index}.{disk}.weight", f"model.{side}.layers.{{i}}.{core}.weight"
            )
            for index, names in enumerate(sublayers)
            for disk, core in names.items()
        ]
    return tuple(found)


ROWS: dict[str, Family] = {
    "t5": Family(
        "T5",
        sizes=SIZES,
        fixed={"stack": "encoder_decoder", "position": "relative", "query_pre_attn_scalar": 1.0},
        # its initial weights follow a rule of their own, which a trained model has no use for
        speaks=frozenset(
            {"tie_word_embeddings", "logits_scaling", "hidden_dropout", "attention_dropout", "initializer_range"}
        ),
        acts={"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu", "gelu": "gelu", "gelu_new": "gelu_tanh"},
        act_field="feed_forward_proj",
        rope=False,
        read=_read,
        write=_write,
        finish=_say_whether_tied,
        rules=_rules,
        bare="",
        # copies of the table, and a bias of cross-attention that the first version wrote and never read
        spare=(
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "EncDecAttention.relative_attention_bias.weight",
        ),
    ),
}  # fmt: skip
