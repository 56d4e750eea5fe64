"""Mamba-2: layers of one mixer each, without attention, positions or feed-forward layers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.row import Family, Inexpressible, require
from llmctl.model.keymap import Rename, Rule
from llmctl.recipe.mixers import SsmSection
from llmctl.recipe.model import ModelSection

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "norm_eps": "layer_norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
# sizes of attention and feed-forward layers, which there are none of
_IDLE = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "intermediate_size": 1}
CONTEXT = 2048  # tokens, where the config names none: what the published models were trained on


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    if config.hidden_act not in ("silu", "swish"):
        raise Inexpressible(f"hidden_act: {config.hidden_act}")
    low, high = config.time_step_limit
    if low > 0 or high != float("inf"):
        raise Inexpressible(f"time_step_limit: [{low}, {high}]")
    return {
        "ssm": {name: getattr(config, name) for name in SsmSection.model_fields},
        "pattern": ["mamba2"],
        "max_position_embeddings": getattr(config, "max_position_embeddings", CONTEXT),
        **_IDLE,
    }


def _write(spec: ModelSection) -> dict[str, Any]:
    require(spec, ffn="none")  # which only stacks of nothing else have
    ssm = spec.ssm
    assert ssm is not None
    return {
        **ssm.model_dump(),
        "num_heads": ssm.expand * spec.hidden_size // ssm.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
    }


def _rules(spec: ModelSection) -> tuple[Rule, ...]:
    disk, core = "backbone.layers.{i}.", "model.layers.{i}."
    products = [f"{name}.{leaf}" for name in ("in_proj", "conv1d", "out_proj") for leaf in ("weight", "bias")]
    inside = ("A_log", "D", "dt_bias", "norm.weight", *products)
    return (
        Rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
        Rename("backbone.norm_f.weight", "model.norm.weight"),
        Rename(disk + "norm.weight", core + "input_layernorm.weight"),
        *(Rename(f"{disk}mixer.{name}", f"{core}self_attn.{name}") for name in inside),
    )


ROWS: dict[str, Family] = {
    "mamba2": Family(
        "Mamba2",
        sizes=_SIZES,
        fixed={"position": "none", "ffn": "none"},
        speaks=frozenset({"ssm", "pattern", "max_position_embeddings", *_IDLE}),
        acts={},
        rope=False,
        read=_read,
        write=_write,
        rules=_rules,
        bare="backbone.",
        unadapted=("out_proj", "conv1d"),  # whose weights some of its kernels read without calling the module
        old={"backbone.embedding.weight": "backbone.embeddings.weight"},
    )
}
