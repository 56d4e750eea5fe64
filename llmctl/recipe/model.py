"""The `model.*` section: an architecture in Hugging Face config vocabulary, checked without torch.

Every choice is one value from a visible table (`NORMS`, `PATTERNS` ...). `llmctl/model/` holds a
class for each name here; a test holds the two together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmctl.recipe.base import Section, about

Family = Literal["auto", "llama", "mistral", "qwen2", "qwen3", "llmctl"]
Norm = Literal["rmsnorm"]
Position = Literal["rope"]
Attention = Literal["gqa"]
Pattern = Literal["full", "sliding"]
Ffn = Literal["swiglu"]
AttentionBias = Literal["none", "qkv", "all"]


class RopeDefault(Section):
    """Rotary positions as published (Su et al. 2021, arXiv:2104.09864)."""

    rope_type: Literal["default"] = about("model.rope_parameters.rope_type", "default")
    rope_theta: float = about("model.rope_parameters.rope_theta", 10000.0, gt=0)


class RopeLinear(Section):
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    rope_type: Literal["linear"] = about("model.rope_parameters.rope_type")
    rope_theta: float = about("model.rope_parameters.rope_theta", 10000.0, gt=0)
    factor: float = about("model.rope_parameters.factor", gt=0)


class RopeLlama3(Section):
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, smooth between."""

    rope_type: Literal["llama3"] = about("model.rope_parameters.rope_type")
    rope_theta: float = about("model.rope_parameters.rope_theta", 500000.0, gt=0)
    factor: float = about("model.rope_parameters.factor", gt=0)
    low_freq_factor: float = about("model.rope_parameters.low_freq_factor", gt=0)
    high_freq_factor: float = about("model.rope_parameters.high_freq_factor", gt=0)
    original_max_position_embeddings: int = about(
        "model.rope_parameters.original_max_position_embeddings", gt=0
    )


def _plain_rope(value: Any) -> Any:
    """`rope_type` may be left out, as Hugging Face allows; it then means `default`."""
    return {"rope_type": "default", **value} if isinstance(value, dict) else value


RopeParameters = Annotated[
    RopeDefault | RopeLinear | RopeLlama3, Field(discriminator="rope_type"), BeforeValidator(_plain_rope)
]


class ModelSection(Section):
    """An architecture. Unset sizes are filled in by `resolved()`, never guessed later."""

    family: Family = about("model.family", "auto")
    vocab_size: int | None = about("model.vocab_size", None, gt=0)
    hidden_size: int = about("model.hidden_size", 256, gt=0)
    intermediate_size: int | None = about("model.intermediate_size", None, gt=0)
    num_hidden_layers: int = about("model.num_hidden_layers", 4, gt=0)
    num_attention_heads: int = about("model.num_attention_heads", 4, gt=0)
    num_key_value_heads: int | None = about("model.num_key_value_heads", None, gt=0)
    head_dim: int | None = about("model.head_dim", None, gt=0)
    max_position_embeddings: int = about("model.max_position_embeddings", 512, gt=0)
    norm: Norm = about("model.norm", "rmsnorm")
    rms_norm_eps: float = about("model.rms_norm_eps", 1e-5, gt=0)
    position: Position = about("model.position", "rope")
    rope_parameters: RopeParameters = about("model.rope_parameters", RopeDefault())
    attention: Attention = about("model.attention", "gqa")
    attention_bias: AttentionBias = about("model.attention_bias", "none")
    qk_norm: bool = about("model.qk_norm", False)
    pattern: list[Pattern] = about("model.pattern", ["full"], min_length=1)
    sliding_window: int | None = about("model.sliding_window", None, gt=0)
    ffn: Ffn = about("model.ffn", "swiglu")
    mlp_bias: bool = about("model.mlp_bias", False)
    tie_word_embeddings: bool = about("model.tie_word_embeddings", True)
    initializer_range: float = about("model.initializer_range", 0.02, gt=0)

    @model_validator(mode="after")
    def sizes_fit(self) -> ModelSection:
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({heads}); "
                "set head_dim to choose a width"
            )
        width = self.head_dim or self.hidden_size // heads
        if self.position == "rope" and width % 2:
            raise ValueError(f"head_dim ({width}) is odd: rotary positions turn pairs of channels")
        if "sliding" in self.pattern and self.sliding_window is None:
            raise ValueError("pattern has `sliding` layers but sliding_window is unset")
        if self.sliding_window is not None and "sliding" not in self.pattern:
            raise ValueError("sliding_window is set but no layer of pattern is `sliding`")
        return self

    def resolved(self, vocab_size: int | None = None) -> ModelSection:
        """A copy with every unset size filled in; `vocab_size` is the tokenizer's."""
        wide = self.intermediate_size or -(-self.hidden_size * 8 // 3 // 64) * 64
        return self.model_copy(
            update={
                "vocab_size": self.vocab_size or vocab_size,
                "intermediate_size": wide,
                "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
                "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            }
        )

    def layer_pattern(self, layer: int) -> Pattern:
        """The attention pattern of one layer: `pattern` repeated over the depth."""
        return self.pattern[layer % len(self.pattern)]
