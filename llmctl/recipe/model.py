"""The `model.*` section: an architecture in Hugging Face config vocabulary, checked without torch.

Every choice is one value from a visible table (`NORMS`, `PATTERNS` ...). `llmctl/model/` holds a
class for each name here; a test holds the two together.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, model_validator

from llmctl.errors import nearest, one_of
from llmctl.recipe.base import Mistake, Section, about
from llmctl.recipe.experts import Experts, SparseExperts, looks_ahead
from llmctl.recipe.mixers import LshSection, MlaSection, RoutingSection, SsmSection
from llmctl.recipe.rope import RopeDefault, RopeParameters

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
# what a kind of layer cannot do without; a mixer's section has defaults and may be left out
SIZES: dict[str, tuple[str, ...]] = {
    "full": (),
    "sliding": ("sliding_window",),
    "band": ("sliding_window",),
    "dilated": ("sliding_window", "dilation"),
    "global": ("num_global_tokens",),
    "random": ("num_random_blocks", "block_size"),
    "block": ("block_size",),
    "routing": (),
    "lsh": (),
    "mamba2": (),
}
SECTIONS = {"routing": RoutingSection, "lsh": LshSection, "mamba2": SsmSection}
SECTION_OF = {"routing": "routing", "lsh": "lsh", "mamba2": "ssm"}


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
    vocab_size: int | None = about("model.vocab_size", None, gt=0)
    type_vocab_size: int = about("model.type_vocab_size", 0, ge=0)
    hidden_size: int = about("model.hidden_size", 256, gt=0)
    intermediate_size: int | None = about("model.intermediate_size", None, gt=0)
    num_hidden_layers: int = about("model.num_hidden_layers", 4, gt=0)
    num_decoder_layers: int | None = about("model.num_decoder_layers", None, gt=0)
    num_attention_heads: int = about("model.num_attention_heads", 4, gt=0)
    num_key_value_heads: int | None = about("model.num_key_value_heads", None, gt=0)
    head_dim: int | None = about("model.head_dim", None, gt=0)
    max_position_embeddings: int = about("model.max_position_embeddings", 512, gt=0)
    norm: Norm = about("model.norm", "rmsnorm")
    norm_eps: float = about("model.norm_eps", 1e-5, gt=0)
    norm_placement: NormPlacement = about("model.norm_placement", "pre")
    embedding_norm: bool = about("model.embedding_norm", False)
    position: Position = about("model.position", "rope")
    position_offset: int = about("model.position_offset", 0, ge=0)
    rope_parameters: RopeParameters = about("model.rope_parameters", RopeDefault())
    relative_attention_num_buckets: int = about("model.relative_attention_num_buckets", 32, gt=3)
    relative_attention_max_distance: int = about("model.relative_attention_max_distance", 128, gt=1)
    attention: Attention = about("model.attention", "gqa")
    mla: MlaSection | None = about("model.mla", None)
    attention_bias: AttentionBias = about("model.attention_bias", "none")
    qk_norm: bool = about("model.qk_norm", False)
    query_pre_attn_scalar: float | None = about("model.query_pre_attn_scalar", None, gt=0)
    attn_logit_softcapping: float | None = about("model.attn_logit_softcapping", None, gt=0)
    pattern: list[LayerKind] = about("model.pattern", ["full"], min_length=1)
    sliding_window: int | None = about("model.sliding_window", None, gt=0)
    dilation: int | None = about("model.dilation", None, gt=1)
    num_global_tokens: int | None = about("model.num_global_tokens", None, gt=0)
    block_size: int | None = about("model.block_size", None, gt=0)
    num_random_blocks: int | None = about("model.num_random_blocks", None, gt=0)
    routing: RoutingSection | None = about("model.routing", None)
    lsh: LshSection | None = about("model.lsh", None)
    ssm: SsmSection | None = about("model.ssm", None)
    ffn: Ffn = about("model.ffn", "swiglu")
    mlp_bias: bool = about("model.mlp_bias", False)
    experts: Experts | None = about("model.experts", None)
    hidden_dropout: float = about("model.hidden_dropout", 0.0, ge=0, lt=1)
    attention_dropout: float = about("model.attention_dropout", 0.0, ge=0, lt=1)
    embedding_multiplier: float = about("model.embedding_multiplier", 1.0, gt=0)
    logits_scaling: float = about("model.logits_scaling", 1.0, gt=0)
    final_logit_softcapping: float | None = about("model.final_logit_softcapping", None, gt=0)
    tie_word_embeddings: bool = about("model.tie_word_embeddings", True)
    initializer_range: float = about("model.initializer_range", 0.02, gt=0)

    @model_validator(mode="after")
    def heads_fit(self) -> ModelSection:
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
            )
        if self.attention == "mla":
            return self
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({heads}); "
                "set head_dim to choose a width"
            )
        width = self.head_dim or self.hidden_size // heads
        if self.position == "rope" and width % 2:
            raise ValueError(f"head_dim ({width}) is odd: rotary positions turn pairs of channels")
        return self

    @model_validator(mode="after")
    def layers_have_their_sizes(self) -> ModelSection:
        kinds = {part for entry in self.pattern for part in entry.split("+")}
        needed = {size for kind in kinds for size in SIZES[kind]}
        for kind in sorted(kinds):
            for size in SIZES[kind]:
                if getattr(self, size) is None:
                    raise ValueError(f"pattern has `{kind}` layers but {size} is unset")
        for size in sorted({size for sizes in SIZES.values() for size in sizes} - needed):
            if getattr(self, size) is not None:
                users = one_of([kind for kind, sizes in SIZES.items() if size in sizes])
                raise ValueError(f"{size} is set but no layer of pattern is {users}")
        for kind, section in SECTION_OF.items():
            if getattr(self, section) is not None and kind not in kinds:
                raise ValueError(f"{section} is set but no layer of pattern is `{kind}`")
        if self.mla is not None and self.attention != "mla":
            raise ValueError("mla is set but attention is not `mla`")
        return self

    @model_validator(mode="after")
    def parts_go_together(self) -> ModelSection:
        if self.stack != "decoder" and "mamba2" in self.pattern:
            raise ValueError(f"`mamba2` layers read from left to right, which stack: {self.stack} does not")
        if self.stack != "encoder" and (why := looks_ahead(self.experts)) is not None:
            raise ValueError(
                f"experts of kind `{self.experts.kind if self.experts else ''}` look ahead ({why}): "
                "they go with stack: encoder only"
            )
        if self.num_decoder_layers is not None and self.stack != "encoder_decoder":
            raise ValueError(f"num_decoder_layers is set but stack is `{self.stack}`")
        if self.experts is not None and self.ffn == "none":
            raise ValueError("experts are feed-forward layers, but ffn is `none`")
        if self.position in ("relative", "alibi") and set(self.pattern) == {"mamba2"}:
            raise ValueError(f"position: {self.position} adds to scores, but `mamba2` layers have none")
        if self.ffn == "none" and set(self.pattern) != {"mamba2"}:
            raise ValueError("ffn: none goes with `mamba2` layers only")
        if isinstance(self.experts, SparseExperts):
            _check_sparse(self.experts)
        ssm = self.ssm
        if ssm is not None and (ssm.expand * self.hidden_size) % ssm.head_dim:
            inner = ssm.expand * self.hidden_size
            raise ValueError(
                f"ssm: expand x hidden_size ({inner}) is not a multiple of head_dim ({ssm.head_dim})"
            )
        if self.attention == "mla":
            if self.position != "rope":
                raise ValueError(
                    f"attention: mla turns part of each key, so position must be rope, not {self.position}"
                )
            if self.mla is not None and self.mla.qk_rope_head_dim % 2:
                raise ValueError(
                    f"mla.qk_rope_head_dim ({self.mla.qk_rope_head_dim}) is odd: rotary positions turn pairs"
                )
            if self.num_key_value_heads not in (None, self.num_attention_heads):
                raise ValueError("attention: mla has no groups of keys; leave num_key_value_heads unset")
        content = sorted({"routing", "lsh"} & set(self.pattern))
        if content and self.position in ("relative", "alibi"):
            raise ValueError(f"`{content[0]}` layers take no score bias, but position is `{self.position}`")
        return self

    @model_validator(mode="after")
    def no_layer_passes_over_a_setting(self) -> ModelSection:
        content = sorted({"routing", "lsh"} & set(self.pattern))
        if content and self.attn_logit_softcapping is not None:
            raise ValueError(f"`{content[0]}` layers do not bend scores, but attn_logit_softcapping is set")
        if content and self.attention_dropout:
            raise ValueError(f"`{content[0]}` layers drop no weights, but attention_dropout is set")
        if self.attention == "mla":
            if self.qk_norm:
                raise ValueError(
                    "attention: mla normalises what it compresses, not queries and keys; drop qk_norm"
                )
            if self.head_dim not in (None, (self.mla or MlaSection()).qk_rope_head_dim):
                raise ValueError("attention: mla has widths of its own; set those of mla instead of head_dim")
        ssm = self.ssm
        if ssm is not None and (heads := ssm.expand * self.hidden_size // ssm.head_dim) % ssm.n_groups:
            raise ValueError(f"ssm: its {heads} heads are not a multiple of n_groups ({ssm.n_groups})")
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


def _check_sparse(experts: SparseExperts) -> None:
    if experts.num_experts_per_tok > experts.num_experts:
        raise ValueError(
            f"experts.num_experts_per_tok ({experts.num_experts_per_tok}) is more than num_experts ({experts.num_experts})"
        )
    if experts.num_experts % experts.n_group:
        raise ValueError(
            f"experts.num_experts ({experts.num_experts}) is not a multiple of n_group ({experts.n_group})"
        )
    if experts.topk_group > experts.n_group:
        raise ValueError(
            f"experts.topk_group ({experts.topk_group}) is more than n_group ({experts.n_group})"
        )
    held = experts.topk_group * experts.num_experts // experts.n_group
    if experts.num_experts_per_tok > held:
        raise ValueError(
            f"experts.num_experts_per_tok ({experts.num_experts_per_tok}) is more than the {held} experts "
            f"that topk_group ({experts.topk_group}) of n_group ({experts.n_group}) groups hold"
        )
