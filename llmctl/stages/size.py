"""`llmctl explain MODEL --size`: what a model costs, from its architecture alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llmctl.errors import UserError
from llmctl.plan.size import (
    active_parameters,
    cache_bytes_of_layer,
    cached_buckets,
    cached_values,
    flops_per_token,
    kv_cache_bytes,
    parameters,
    stacks,
)
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
CACHED = {"float32": 4, "bfloat16": 2}  # bytes of a number in the cache: on a CPU, elsewhere


def run(spec: ModelSection, tokens: int | None = None) -> dict[str, Any]:
    """Parameters by part, bytes by precision, KV-cache and FLOPs.

    Args:
        tokens: in the cache, and in the row over which FLOPs are averaged; the whole context when None.

    Raises UserError if there are more than the context holds.
    """
    length = tokens or spec.max_position_embeddings
    if length > spec.max_position_embeddings:
        raise UserError(
            f"--tokens is {length:,}, but the model's context is {spec.max_position_embeddings:,}",
            "lower --tokens",
        )
    parts = parameters(spec)
    total, forward = sum(parts.values()), flops_per_token(spec, length)
    cached = spec.stack != "encoder"
    return {
        "architecture": spec.model_dump(mode="json", exclude_none=True),
        "parameters": {"total": total, "active": active_parameters(spec), **parts},
        "bytes": {name: -(-total * bits // 8) for name, bits in BITS.items()},
        "tokens": length,
        "kv_cache": {
            "formula": cache_formula(spec, length, CACHED["bfloat16"]),
            "bytes": {name: kv_cache_bytes(spec, length, each) for name, each in CACHED.items()},
        }
        if cached
        else None,
        "flops_per_token": {"forward": forward, "training": 3 * forward},
    }


def cache_formula(spec: ModelSection, tokens: int, bytes_per_value: int) -> str:
    """`plan.size.kv_cache_bytes` with the numbers filled in; layers that keep the same are told together."""
    layers = range(stacks(spec)[-1].layers)
    kept = Counter(_kept_by(spec, layer, tokens, bytes_per_value) for layer in layers)
    sums = [f"{count} {'layers' if count > 1 else 'layer'} × {term}" for term, count in kept.items()]
    return f"{' + '.join(sums)} = {kv_cache_bytes(spec, tokens, bytes_per_value):,}"


def _kept_by(spec: ModelSection, layer: int, tokens: int, bytes_per_value: int) -> str:
    kind = spec.layer_pattern(layer)
    if kind == "mamba2":
        state = cache_bytes_of_layer(spec, layer, tokens, bytes_per_value)
        return f"{state:,} bytes of a state, however many the tokens"
    first, second = cached_values(spec, kind)
    width = spec.head_dim or 1
    if spec.mla is not None and kind not in ("routing", "lsh"):
        kept = f"({first:,} of a latent + {second:,} of a rotary key)"
    elif first != second:
        kept = f"({first:,} of keys + {second:,} of values)"
    else:
        kept = f"2 (keys and values) × {first // width} heads × {width} channels"
    buckets = cached_buckets(spec, kind)
    if buckets:
        return f"({kept} × {bytes_per_value} bytes + {buckets:,} buckets × 4 bytes) × {tokens:,} tokens"
    return f"{kept} × {tokens:,} tokens × {bytes_per_value} bytes"


def spec_of_model(where: str) -> ModelSection:
    """The architecture of a run folder, a Hugging Face folder or a hub id, from its config.json."""
    # torch takes seconds to import, and the size of a recipe needs none of it
    from llmctl.model.open import open_config

    return open_config(where).spec


def spec_of_recipe(recipe: PretrainRecipe, source: str) -> ModelSection:
    """The architecture that a recipe trains; the vocabulary is the tokenizer's where the recipe says nothing.

    Args:
        source: what the recipe is called in messages.

    Raises UserError if nothing says how many entries there are, or the tokenizer cannot be opened.
    """
    if recipe.base is not None:
        return spec_of_model(recipe.base)
    spec = recipe.model or ModelSection()
    if spec.vocab_size is not None:
        return spec.resolved()
    if recipe.tokenizer is None:
        raise UserError(
            f"{source}: model.vocab_size is unset, and no tokenizer says how many entries there are",
            "add model.vocab_size=8192, or tokenizer=DIR",
        )
    return spec.resolved(_entries(recipe.tokenizer))


def _entries(tokenizer: str) -> int:
    from llmctl.stages.text import highest_id
    from llmctl.tokenizer.load import load_tokenizer

    opened = load_tokenizer(tokenizer)
    return max(len(opened), highest_id(opened) + 1)
