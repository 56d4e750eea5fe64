"""Phi-3: Llama with queries, keys and values in one matrix, and gate and up in another."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.llama import read_one_window, write_one_window
from llmctl.model.families.row import Family, Inexpressible, write_rope
from llmctl.model.keymap import Rule, Split
from llmctl.recipe.model import ModelSection


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    for name in ("resid_pdrop", "embd_pdrop"):  # the one drops sublayers only, the other nothing
        if getattr(config, name):
            raise Inexpressible(f"{name}: {getattr(config, name)}")
    return read_one_window(config)


def _write(spec: ModelSection) -> dict[str, Any]:
    if spec.num_attention_heads * (spec.head_dim or 0) != spec.hidden_size:
        raise Inexpressible(f"head_dim: {spec.head_dim}")
    if (kind := write_rope(spec)["rope_type"]) != "default":
        raise Inexpressible(f"rope_type: {kind}")
    return write_one_window(spec)


def _rules(spec: ModelSection) -> tuple[Rule, ...]:
    assert spec.head_dim is not None and spec.num_key_value_heads is not None
    layer = "model.layers.{i}."
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    return (
        Split(
            layer + "self_attn.qkv_proj.weight",
            tuple(f"{layer}self_attn.{part}_proj.weight" for part in "qkv"),
            sizes=(queries, keys, keys),
        ),
        Split(
            layer + "mlp.gate_up_proj.weight",
            tuple(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up")),
        ),
    )


ROWS: dict[str, Family] = {
    "phi3": Family(
        "Phi3",
        speaks=frozenset({"pattern", "sliding_window"}),
        read=_read,
        write=_write,
        rules=_rules,
    )
}
