"""GPT-2: learned positions, layer norms with biases, and linear layers stored (in, out), queries to values in one."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.row import Family, Inexpressible, require
from llmctl.model.keymap import Rename, Rule, Split
from llmctl.recipe.model import ModelSection

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "attention_dropout": "attn_pdrop",
}


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, name):
            raise Inexpressible(f"{name}: true")
    if config.resid_pdrop != config.embd_pdrop:
        raise Inexpressible(f"resid_pdrop {config.resid_pdrop} with embd_pdrop {config.embd_pdrop}")
    return {
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "hidden_dropout": config.resid_pdrop,
        "query_pre_attn_scalar": None if config.scale_attn_weights else 1.0,
    }


def _write(spec: ModelSection) -> dict[str, Any]:
    require(spec, num_key_value_heads=spec.num_attention_heads)
    if spec.num_attention_heads * (spec.head_dim or 0) != spec.hidden_size:
        raise Inexpressible(f"head_dim: {spec.head_dim}")
    if spec.query_pre_attn_scalar not in (None, 1.0, spec.head_dim):
        raise Inexpressible(f"query_pre_attn_scalar: {spec.query_pre_attn_scalar}")
    return {
        "n_inner": None if spec.intermediate_size == 4 * spec.hidden_size else spec.intermediate_size,
        "resid_pdrop": spec.hidden_dropout,
        "embd_pdrop": spec.hidden_dropout,
        "scale_attn_weights": spec.query_pre_attn_scalar != 1.0,
    }


def _rules(spec: ModelSection) -> tuple[Rule, ...]:
    disk, core = "transformer.h.{i}.", "model.layers.{i}."
    norms = {
        disk + "ln_1": core + "input_layernorm",
        disk + "ln_2": core + "post_attention_layernorm",
        "transformer.ln_f": "model.norm",
    }
    products = {
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    rules: list[Rule] = [
        Rename("transformer.wte.weight", "model.embed_tokens.weight"),
        Rename("transformer.wpe.weight", "model.positions.weight"),
    ]
    for leaf in ("weight", "bias"):
        of_matrix = leaf == "weight"
        qkv = tuple(f"{core}self_attn.{part}_proj.{leaf}" for part in "qkv")
        rules += [Rename(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in norms.items()]
        rules += [
            Rename(f"{disk}{theirs}.{leaf}", f"{core}{ours}.{leaf}", transpose=of_matrix)
            for theirs, ours in products.items()
        ]
        rules.append(Split(f"{disk}attn.c_attn.{leaf}", qkv, dim=1 if of_matrix else 0, transpose=of_matrix))
    return tuple(rules)


ROWS: dict[str, Family] = {
    "gpt2": Family(
        "GPT2",
        classes={"ForCausalLM": "LMHeadModel"},
        sizes=_SIZES,
        fixed={"norm": "layernorm", "position": "learned", "attention_bias": "all", "mlp_bias": True},
        speaks=frozenset(
            {
                "intermediate_size",
                "num_key_value_heads",
                "head_dim",
                "hidden_dropout",
                "query_pre_attn_scalar",
            }
        ),
        acts={
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
            "gelu": "gelu",
            "relu": "relu",
            "relu2": "relu2",
        },
        act_field="activation_function",
        rope=False,
        read=_read,
        write=_write,
        rules=_rules,
        bare="transformer.",
    )
}
