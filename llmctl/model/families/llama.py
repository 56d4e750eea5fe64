"""Llama and its nearest relatives, whose tensors have the core's names."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.row import (
    Family,
    Inexpressible,
    layer_kinds,
    read_layer_types,
    require,
    write_layer_types,
)
from llmctl.recipe.model import ModelSection


def _read_llama(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": "all" if config.attention_bias else "none", "mlp_bias": config.mlp_bias}


def _write_llama(spec: ModelSection) -> dict[str, Any]:
    if spec.hidden_size % spec.num_attention_heads:
        raise Inexpressible(f"hidden_size {spec.hidden_size} with {spec.num_attention_heads} heads")
    return {**write_bias(spec), "mlp_bias": spec.mlp_bias}


def read_one_window(config: PreTrainedConfig) -> dict[str, Any]:
    """`pattern` and `sliding_window` of a config with one window for all layers, or none."""
    if config.sliding_window is None:
        return {}
    return {"sliding_window": config.sliding_window, "pattern": ["sliding"]}


def write_one_window(spec: ModelSection) -> dict[str, Any]:
    """`sliding_window` of a config that has one for all layers, or none. Raises Inexpressible."""
    kinds = set(layer_kinds(spec))
    if kinds not in ({"full"}, {"sliding"}):
        raise Inexpressible(f"pattern: {spec.pattern}")
    return {"sliding_window": spec.sliding_window if kinds == {"sliding"} else None}


def _read_qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": "qkv", **read_layer_types(config)}


def _write_qwen2(spec: ModelSection) -> dict[str, Any]:
    require(spec, attention_bias="qkv")
    if spec.head_dim != spec.hidden_size // spec.num_attention_heads:
        raise Inexpressible(f"head_dim: {spec.head_dim}")
    return write_windows(spec)


def _read_qwen3(config: PreTrainedConfig) -> dict[str, Any]:
    bias = "all" if config.attention_bias else "none"
    return {"attention_bias": bias, **read_layer_types(config)}


def _write_qwen3(spec: ModelSection) -> dict[str, Any]:
    return {**write_bias(spec), **write_windows(spec)}


def write_bias(spec: ModelSection) -> dict[str, Any]:
    """`attention_bias` of a config that has it for all projections or none. Raises Inexpressible."""
    if spec.attention_bias == "qkv":
        raise Inexpressible("attention_bias: qkv")
    return {"attention_bias": spec.attention_bias == "all"}


def write_windows(spec: ModelSection) -> dict[str, Any]:
    """Layer types and window, as Qwen's configs have them. Raises Inexpressible."""
    types = write_layer_types(spec)
    return {
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "layer_types": types,
    }


_WINDOW = frozenset({"pattern", "sliding_window"})

ROWS: dict[str, Family] = {
    "llama": Family(
        "Llama", read=_read_llama, write=_write_llama, speaks=frozenset({"attention_bias", "mlp_bias"})
    ),
    "mistral": Family("Mistral", read=read_one_window, write=write_one_window, speaks=_WINDOW),
    "qwen2": Family("Qwen2", read=_read_qwen2, write=_write_qwen2, speaks=_WINDOW | {"attention_bias"}),
    "qwen3": Family(
        "Qwen3",
        read=_read_qwen3,
        write=_write_qwen3,
        fixed={"qk_norm": True},
        speaks=_WINDOW | {"attention_bias"},
    ),
}
