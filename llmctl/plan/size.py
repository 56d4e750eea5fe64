"""Sizes of an architecture from its numbers alone: parameters, FLOPs, memory of a decoding. No torch.

The one source of these figures: the plan, `explain`, the benchmarks and the docs all call it. Sections are
resolved: every size is filled in.
"""

from __future__ import annotations

from llmctl.plan.experts import expert_parameters, ffn_parameters
from llmctl.recipe.mixers import MlaSection, SsmSection
from llmctl.recipe.model import ModelSection

PARTS = ("embedding", "attention", "ffn", "norm", "head")


def parameters(model: ModelSection) -> dict[str, int]:
    """Parameters by part: embedding, attention (every kind of mixer), ffn (with experts), norm, head (0 when tied)."""
    width, vocab = model.hidden_size, _set(model.vocab_size)
    table = vocab * width
    total = dict.fromkeys(PARTS, 0)
    total["embedding"] = table
    total["head"] = (0 if model.tie_word_embeddings else table) + _transform(model)
    for stack in stacks(model):
        total["embedding"] += _position_table(model) + model.type_vocab_size * width
        total["norm"] += norm_size(model) * ((model.norm_placement != "post") + model.embedding_norm)
        for layer in range(stack.layers):
            total["attention"] += mixer_parameters(model, layer)
            total["ffn"] += layer_ffn(model, layer)[0]
            total["norm"] += _layer_norms(model, layer)
            if stack.cross:
                total["attention"] += attention_parameters(model)
                total["norm"] += norm_size(model)
    return total


class StackSize:
    """One stack of a model: its number of layers, and whether they read an encoder's states."""

    def __init__(self, layers: int, cross: bool = False) -> None:
        self.layers, self.cross = layers, cross


def stacks(model: ModelSection) -> list[StackSize]:
    """The stacks that a model is made of."""
    first = StackSize(model.num_hidden_layers)
    if model.stack != "encoder_decoder":
        return [first]
    return [first, StackSize(model.num_decoder_layers or model.num_hidden_layers, cross=True)]


def total_parameters(model: ModelSection) -> int:
    """All parameters of the backbone and a language-model head, a tied table counted once."""
    return sum(parameters(model).values())


def active_parameters(model: ModelSection) -> int:
    """Parameters that one token passes through, on average: of experts, those it is routed to."""
    idle = 0
    for stack in stacks(model):
        for layer in range(stack.layers):
            held, active = layer_ffn(model, layer)
            idle += held - active
    return total_parameters(model) - idle


def attention_parameters(model: ModelSection) -> int:
    """Projections of one attention layer with keys and values in groups, without its norms."""
    width, head_dim = model.hidden_size, _set(model.head_dim)
    queries, keys = model.num_attention_heads * head_dim, _set(model.num_key_value_heads) * head_dim
    found = 2 * width * queries + 2 * width * keys
    if model.attention_bias != "none":
        found += queries + 2 * keys
    return found + (width if model.attention_bias == "all" else 0)


def mixer_parameters(model: ModelSection, layer: int) -> int:
    """Parameters of the mixer of one layer, without the norms of queries and keys."""
    kind = model.layer_pattern(layer)
    if kind == "mamba2" and model.ssm is not None:
        return _ssm_parameters(model, model.ssm)
    if kind == "lsh":
        # queries are keys as well
        keys = _set(model.num_key_value_heads) * _set(model.head_dim)
        bias = keys if model.attention_bias != "none" else 0
        return attention_parameters(model) - model.hidden_size * keys - bias
    if model.attention == "mla" and kind != "routing" and model.mla is not None:
        return _mla_parameters(model, model.mla)
    return attention_parameters(model)


def layer_ffn(model: ModelSection, layer: int) -> tuple[int, int]:
    """(all, active) parameters of the feed-forward part of one layer."""
    if model.has_experts(layer):
        return expert_parameters(model)
    inner = 0 if model.ffn == "none" else _set(model.intermediate_size)
    dense = ffn_parameters(model, inner)
    return dense, dense


def norm_size(model: ModelSection, width: int | None = None) -> int:
    """Parameters of one norm over `width` channels; hidden_size when None."""
    return (width or model.hidden_size) * (2 if model.norm == "layernorm" else 1)


def flops_per_token(model: ModelSection, length: int) -> int:
    """Forward FLOPs per token at context `length`: 2 per weight of each matrix product, plus attention.

    Training costs three times as much. Attention counts what a query sees, on average over the positions of
    a causal row, or all of it in an encoder (PaLM, Chowdhery et al. 2022, appendix B). For an encoder–decoder
    it is the mean of what a token costs in either stack, with as many tokens in each.
    """
    head = _set(model.vocab_size) + (model.hidden_size if model.stack == "encoder" else 0)
    found = 2.0 * head * model.hidden_size
    models = stacks(model)
    for stack in models:
        causal = model.stack == "decoder" or stack.cross
        for layer in range(stack.layers):
            weights = mixer_parameters(model, layer) + layer_ffn(model, layer)[1]
            found += (2 * weights + _mixing_flops(model, layer, length, causal)) / len(models)
            if stack.cross:
                inner = model.num_attention_heads * _set(model.head_dim)
                found += (2 * attention_parameters(model) + 4 * inner * length) / len(models)
    return int(found)


def _mixing_flops(model: ModelSection, layer: int, length: int, causal: bool) -> float:
    """FLOPs by which one token is mixed with others, the projections aside."""
    kind = model.layer_pattern(layer)
    if kind == "mamba2" and model.ssm is not None:
        # written into the state and read from it
        return 6.0 * model.ssm.expand * model.hidden_size * model.ssm.state_size
    keys, values = _score_widths(model, kind)
    return 2 * model.num_attention_heads * (keys + values) * keys_seen(model, kind, length, causal)


def keys_seen(model: ModelSection, kind: str, length: int, causal: bool) -> float:
    """Mean number of keys that a query of a kind of layer sees in a row of `length` tokens.

    Kinds joined by `+` are counted as if they did not overlap, up to all there are.
    """
    everything = (length + 1) / 2 if causal else float(length)
    return min(everything, sum(_seen(model, part, length, causal) for part in kind.split("+")))


def _seen(model: ModelSection, kind: str, length: int, causal: bool) -> float:
    sides = 1 if causal else 2
    everything = (length + 1) / 2 if causal else float(length)
    if kind in ("sliding", "band"):
        reach = min(length, _set(model.sliding_window))
        one_side = reach - reach * (reach - 1) / (2 * length)
        return one_side if causal or kind == "sliding" else 2 * one_side - 1
    if kind == "dilated":
        return min(everything, sides * float(_set(model.sliding_window)))
    if kind == "global":
        return min(everything, float(_set(model.num_global_tokens)) + 1)
    if kind == "block":
        size = min(length, _set(model.block_size))
        return (size + 1) / 2 if causal else float(size)
    if kind == "random":
        drawn = _set(model.num_random_blocks) * sides
        return min(everything, float((drawn + 1) * _set(model.block_size)))
    if kind == "routing" and model.routing is not None:
        return min(everything, 1.5 * model.routing.chunk_size)
    if kind == "lsh" and model.lsh is not None:
        return min(everything, 1.5 * model.lsh.chunk_size * model.lsh.num_hashes)
    return everything


def cache_bytes_of_layer(model: ModelSection, layer: int, tokens: int, bytes_per_value: int) -> int:
    """What one layer remembers of `tokens` tokens of a row."""
    kind = model.layer_pattern(layer)
    if kind == "mamba2" and model.ssm is not None:
        inner = model.ssm.expand * model.hidden_size
        window = (inner + 2 * model.ssm.n_groups * model.ssm.state_size) * (model.ssm.conv_kernel - 1)
        # whatever the number of tokens; what is carried on is kept in float32 at least
        return inner * model.ssm.state_size * max(4, bytes_per_value) + window * bytes_per_value
    buckets = cached_buckets(model, kind) * 4  # integers of 32 bits
    return (sum(cached_values(model, kind)) * bytes_per_value + buckets) * tokens


def cached_buckets(model: ModelSection, kind: str) -> int:
    """Numbers of buckets that a layer keeps of each token, where those are by content."""
    rounds = {"routing": 1, "lsh": model.lsh.num_hashes if model.lsh is not None else 0}.get(kind, 0)
    return rounds * model.num_attention_heads


def cached_values(model: ModelSection, kind: str) -> tuple[int, ...]:
    """Numbers that a layer of this kind keeps of each token, one entry for each thing that is kept."""
    head_dim, heads = _set(model.head_dim), model.num_attention_heads
    if kind == "lsh":
        return (heads * head_dim, _set(model.num_key_value_heads) * head_dim)
    if model.mla is not None and kind != "routing":
        return (model.mla.kv_lora_rank, model.mla.qk_rope_head_dim)
    return (_set(model.num_key_value_heads) * head_dim,) * 2


def kv_cache_bytes(model: ModelSection, tokens: int, bytes_per_value: int) -> int:
    """What a decoder remembers of `tokens` tokens of a row; of attention 2 x layers x kv heads x head_dim a token."""
    layers = stacks(model)[-1].layers
    return sum(cache_bytes_of_layer(model, layer, tokens, bytes_per_value) for layer in range(layers))


def _score_widths(model: ModelSection, kind: str) -> tuple[int, int]:
    """Widths of a head's keys and values."""
    if model.mla is not None and kind not in ("routing", "lsh"):
        return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim, model.mla.v_head_dim
    return _set(model.head_dim), _set(model.head_dim)


def _mla_parameters(model: ModelSection, mla: MlaSection) -> int:
    width, heads = model.hidden_size, model.num_attention_heads
    queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    into = width * queries if mla.q_lora_rank is None else mla.q_lora_rank * (width + queries)
    compressed = width * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    expanded = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    found = into + compressed + expanded + heads * mla.v_head_dim * width
    if model.attention_bias != "none":
        found += mla.kv_lora_rank + mla.qk_rope_head_dim + (mla.q_lora_rank or 0)
    return found + (width if model.attention_bias == "all" else 0)


def _ssm_parameters(model: ModelSection, ssm: SsmSection) -> int:
    inner = ssm.expand * model.hidden_size
    heads, shared = inner // ssm.head_dim, 2 * ssm.n_groups * ssm.state_size
    projected = 2 * inner + shared + heads
    found = model.hidden_size * (projected + inner) + (inner + shared) * ssm.conv_kernel + 3 * heads
    found += projected + model.hidden_size if ssm.use_bias else 0
    return found + (inner + shared if ssm.use_conv_bias else 0)


def _transform(model: ModelSection) -> int:
    """What the head of an encoder, a masked language model's, has besides its matrix: a layer, a norm, a bias."""
    if model.stack != "encoder":
        return 0
    width = model.hidden_size
    return width * width + width + norm_size(model) + _set(model.vocab_size)


def _position_table(model: ModelSection) -> int:
    if model.position == "learned":
        return (model.max_position_embeddings + model.position_offset) * model.hidden_size
    if model.position == "relative":
        return model.relative_attention_num_buckets * model.num_attention_heads
    return 0


def _layer_norms(model: ModelSection, layer: int) -> int:
    """Norms around and inside one layer."""
    sublayers = 1 if model.ffn == "none" else 2
    found = norm_size(model) * sublayers * (2 if model.norm_placement == "sandwich" else 1)
    kind = model.layer_pattern(layer)
    if kind == "mamba2" and model.ssm is not None:
        return found + model.ssm.expand * model.hidden_size  # the gated RMSNorm inside
    if model.mla is not None and kind not in ("routing", "lsh"):
        return found + model.mla.kv_lora_rank + (model.mla.q_lora_rank or 0)
    normed = 1 if kind == "lsh" else 2
    return found + (normed * norm_size(model, model.head_dim) if model.qk_norm else 0)


def _set(value: int | None) -> int:
    assert value is not None, "the section is not resolved"
    return value
