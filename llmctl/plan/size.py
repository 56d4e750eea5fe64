"""Sizes of an architecture from its numbers alone: parameters, FLOPs, KV-cache bytes. No torch.

The one source of these figures: the plan, `explain`, the benchmarks and the docs all call it.
"""

from __future__ import annotations

from llmctl.recipe.model import ModelSection


def parameters(model: ModelSection) -> dict[str, int]:
    """Parameters by part: embedding, attention, ffn, norm, head (0 when tied). `model` must be resolved."""
    width, layers = model.hidden_size, model.num_hidden_layers
    vocab, inner = _set(model.vocab_size), _set(model.intermediate_size)
    head_dim, groups = _set(model.head_dim), _set(model.num_key_value_heads)
    queries, keys = model.num_attention_heads * head_dim, groups * head_dim
    attention = 2 * width * queries + 2 * width * keys
    if model.attention_bias != "none":
        attention += queries + 2 * keys
    if model.attention_bias == "all":
        attention += width
    ffn = 3 * width * inner + (2 * inner + width if model.mlp_bias else 0)
    norm = 2 * width + (2 * head_dim if model.qk_norm else 0)
    return {
        "embedding": vocab * width,
        "attention": layers * attention,
        "ffn": layers * ffn,
        "norm": layers * norm + width,
        "head": 0 if model.tie_word_embeddings else vocab * width,
    }


def total_parameters(model: ModelSection) -> int:
    """All parameters, a tied table counted once."""
    return sum(parameters(model).values())


def flops_per_token(model: ModelSection, length: int) -> int:
    """Forward FLOPs per token at context `length`: 2 per weight of each matrix product, plus attention.

    Training costs three times as much. Attention counts the causal half: on average a token sees
    length / 2 keys, fewer under a sliding window (PaLM, Chowdhery et al. 2022, appendix B).
    """
    parts = parameters(model)
    head = _set(model.vocab_size) * model.hidden_size
    products = 2 * (parts["attention"] + parts["ffn"] + head)
    inner = model.num_attention_heads * _set(model.head_dim)
    seen = 0.0
    for layer in range(model.num_hidden_layers):
        window = model.sliding_window if model.layer_pattern(layer) == "sliding" else None
        reach = min(length, window or length)
        # mean over positions of min(position + 1, reach)
        seen += reach - reach * (reach - 1) / (2 * length)
    return int(products + 4 * inner * seen)


def kv_cache_bytes(model: ModelSection, tokens: int, bytes_per_value: int) -> int:
    """Keys and values of `tokens` tokens: 2 x layers x kv heads x head_dim x tokens x bytes."""
    per_token = 2 * model.num_hidden_layers * _set(model.num_key_value_heads) * _set(model.head_dim)
    return per_token * tokens * bytes_per_value


def _set(value: int | None) -> int:
    assert value is not None, "the section is not resolved"
    return value
