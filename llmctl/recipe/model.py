"""The `model.*` section: an architecture in Hugging Face config vocabulary, checked without torch.

Every choice is one value from a visible table (`NORMS`, `PATTERNS` ...). `llmctl/model/` holds a
class for each name here; a test holds the two together.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, model_validator

from llmctl.errors import nearest, one_of
from llmctl.recipe.base import Mistake, Section, about
from llmctl.recipe.experts import Experts
from llmctl.recipe.mixers import LshSection, MlaSection, RoutingSection, SsmSection
from llmctl.recipe.ranges import (
    MOST_ENTRIES,
    MOST_FACTOR,
    MOST_INNER,
    MOST_LAYERS,
    MOST_PARTS,
    MOST_TOKENS,
    MOST_WIDTH,
)
from llmctl.recipe.rope import RopeDefault, RopeParameters
from llmctl.recipe.sense import SECTION_OF, SECTIONS, mistakes

Family = Literal[
    "auto", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "mixtral", "qwen3_moe",
    "deepseek_v3", "mamba2", "bert", "roberta", "t5", "llmctl",
]  # fmt: skip
StackKind = Literal["decoder", "encoder", "encoder_decoder"]
Norm = Literal["rmsnorm", "rmsnorm1p", "layernorm"]
NormPlacement = Literal["pre", "post", "sandwich"]
Position = Literal["rope", "learned", "sinusoidal", "relative", "alibi", "none"]
Attention = Literal["gqa", "mla"]
Pattern = Literal["full", "sliding", "band", "dilated", "global", "random", "block"]
Mixer = Literal["routing", "lsh", "mamba2"]
Ffn = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2", "none"]
AttentionBias = Literal["none", "qkv", "all"]

GATED = ("swiglu", "geglu")


def _known_layer(entry: str) -> str:
    predicates, mixers = get_args(Pattern), get_args(Mixer)
    parts = entry.split("+")
    for part in parts:
        if part not in predicates and part not in mixers:
            close = nearest(part, [*predicates, *mixers])
            raise Mistake(
                f"`{part}` is not one of {one_of([*predicates, *mixers])}",
                f"did you mean `{close}`?" if close else None,
            )
        if part in mixers and len(parts) > 1:
            raise Mistake(f"`{entry}`: `{part}` is a layer of its own and joins no other")
    if "full" in parts and len(parts) > 1:
        raise Mistake(f"`{entry}`: `full` sees everything already", "drop it or the others")
    return entry


LayerKind = Annotated[str, AfterValidator(_known_layer)]


class ModelSection(Section):
    """An architecture. Unset sizes are filled in by `resolved()`, never guessed later."""

    family: Family = about("model.family", "auto")
    stack: StackKind = about("model.stack", "decoder")
    vocab_size: int | None = about("model.vocab_size", None, gt=0, le=MOST_ENTRIES)
    type_vocab_size: int = about("model.type_vocab_size", 0, ge=0, le=MOST_WIDTH)
    hidden_size: int = about("model.hidden_size", 256, gt=0, le=MOST_WIDTH)
    intermediate_size: int | None = about("model.intermediate_size", None, gt=0, le=MOST_INNER)
    num_hidden_layers: int = about("model.num_hidden_layers", 4, gt=0, le=MOST_LAYERS)
    num_decoder_layers: int | None = about("model.num_decoder_layers", None, gt=0, le=MOST_LAYERS)
    num_attention_heads: int = about("model.num_attention_heads", 4, gt=0, le=MOST_PARTS)
    num_key_value_heads: int | None = about("model.num_key_value_heads", None, gt=0, le=MOST_PARTS)
    head_dim: int | None = about("model.head_dim", None, gt=0, le=MOST_WIDTH)
    max_position_embeddings: int = about("model.max_position_embeddings", 512, gt=0, le=MOST_TOKENS)
    norm: Norm = about("model.norm", "rmsnorm")
    norm_eps: float = about("model.norm_eps", 1e-5, gt=0, le=1)
    norm_placement: NormPlacement = about("model.norm_placement", "pre")
    embedding_norm: bool = about("model.embedding_norm", False)
    position: Position = about("model.position", "rope")
    position_offset: int = about("model.position_offset", 0, ge=0, le=MOST_TOKENS)
    rope_parameters: RopeParameters = about("model.rope_parameters", RopeDefault())
    relative_attention_num_buckets: int = about(
        "model.relative_attention_num_buckets", 32, gt=3, le=MOST_PARTS
    )
    relative_attention_max_distance: int = about(
        "model.relative_attention_max_distance", 128, gt=1, le=MOST_TOKENS
    )
    attention: Attention = about("model.attention", "gqa")
    mla: MlaSection | None = about("model.mla", None)
    attention_bias: AttentionBias = about("model.attention_bias", "none")
    qk_norm: bool = about("model.qk_norm", False)
    query_pre_attn_scalar: float | None = about("model.query_pre_attn_scalar", None, gt=0, le=MOST_FACTOR)
    attn_logit_softcapping: float | None = about("model.attn_logit_softcapping", None, gt=0, le=MOST_FACTOR)
    pattern: list[LayerKind] = about("model.pattern", ["full"], min_length=1)
    sliding_window: int | None = about("model.sliding_window", None, gt=0, le=MOST_TOKENS)
    dilation: int | None = about("model.dilation", None, gt=1, le=MOST_TOKENS)
    num_global_tokens: int | None = about("model.num_global_tokens", None, gt=0, le=MOST_TOKENS)
    block_size: int | None = about("model.block_size", None, gt=0, le=MOST_TOKENS)
    num_random_blocks: int | None = about("model.num_random_blocks", None, gt=0, le=MOST_PARTS)
    routing: RoutingSection | None = about("model.routing", None)
    lsh: LshSection | None = about("model.lsh", None)
    ssm: SsmSection | None = about("model.ssm", None)
    ffn: Ffn = about("model.ffn", "swiglu")
    mlp_bias: bool = about("model.mlp_bias", False)
    experts: Experts | None = about("model.experts", None)
    hidden_dropout: float = about("model.hidden_dropout", 0.0, ge=0, lt=1)
    attention_dropout: float = about("model.attention_dropout", 0.0, ge=0, lt=1)
    embedding_multiplier: float = about("model.embedding_multiplier", 1.0, gt=0, le=MOST_FACTOR)
    logits_scaling: float = about("model.logits_scaling", 1.0, gt=0, le=MOST_FACTOR)
    final_logit_softcapping: float | None = about("model.final_logit_softcapping", None, gt=0, le=MOST_FACTOR)
    tie_word_embeddings: bool = about("model.tie_word_embeddings", True)
    initializer_range: float = about("model.initializer_range", 0.02, gt=0, le=MOST_FACTOR)

    @model_validator(mode="after")
    def makes_sense(self) -> ModelSection:
        for mistake in mistakes(self):
            raise ValueError(mistake)
        return self

    def resolved(self, vocab_size: int | None = None) -> ModelSection:
        """A copy with every unset size filled in; `vocab_size` is the tokenizer's."""
        wide = self.hidden_size * 8 // 3 if self.ffn in GATED else self.hidden_size * 4
        mla = MlaSection() if self.attention == "mla" and self.mla is None else self.mla
        sections = {
            name: getattr(self, name) or SECTIONS[kind]()
            for kind, name in SECTION_OF.items()
            if kind in self.pattern
        }
        width = mla.qk_rope_head_dim if mla else self.head_dim or self.hidden_size // self.num_attention_heads
        return self.model_copy(
            update={
                "vocab_size": self.vocab_size or vocab_size,
                "intermediate_size": self.intermediate_size or -(-wide // 64) * 64,
                "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
                "head_dim": width,
                "mla": mla,
                **sections,
            }
        )

    def layer_pattern(self, layer: int) -> str:
        """The kind of one layer: `pattern` repeated over the depth."""
        return self.pattern[layer % len(self.pattern)]

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of a layer is made of experts."""
        return self.experts is not None and layer >= self.experts.first_k_dense_replace

    @property
    def intermediate_of_expert(self) -> int:
        """Inner width of one expert; the section must be resolved."""
        assert self.experts is not None and self.intermediate_size is not None
        return self.experts.moe_intermediate_size or self.intermediate_size
