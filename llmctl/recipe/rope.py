"""`model.rope_parameters`: the base of the rotation and how it is stretched for longer contexts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmctl.recipe.base import Section, about
from llmctl.recipe.ranges import MOST_FACTOR, MOST_THETA, MOST_TOKENS

_AT = "model.rope_parameters."


class RopeDefault(Section):
    """Rotary positions as published (Su et al. 2021, arXiv:2104.09864)."""

    rope_type: Literal["default"] = about(_AT + "rope_type", "default")
    rope_theta: float = about(_AT + "rope_theta", 10000.0, gt=0, le=MOST_THETA)


class RopeLinear(Section):
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    rope_type: Literal["linear"] = about(_AT + "rope_type")
    rope_theta: float = about(_AT + "rope_theta", 10000.0, gt=0, le=MOST_THETA)
    factor: float = about(_AT + "factor", gt=0, le=MOST_FACTOR)


class RopeNtk(Section):
    """The base raised, so that the slowest pair turns `factor` times slower and the fastest as before (bloc97 2023)."""

    rope_type: Literal["ntk"] = about(_AT + "rope_type")
    rope_theta: float = about(_AT + "rope_theta", 10000.0, gt=0, le=MOST_THETA)
    factor: float = about(_AT + "factor", gt=0, le=MOST_FACTOR)


class RopeYarn(Section):
    """Slow pairs divided by `factor`, fast ones kept, the rest blended, scores warmed (Peng et al. 2023, arXiv:2309.00071)."""

    rope_type: Literal["yarn"] = about(_AT + "rope_type")
    rope_theta: float = about(_AT + "rope_theta", 10000.0, gt=0, le=MOST_THETA)
    factor: float = about(_AT + "factor", gt=0, le=MOST_FACTOR)
    original_max_position_embeddings: int = about(
        _AT + "original_max_position_embeddings", gt=0, le=MOST_TOKENS
    )
    beta_fast: float = about(_AT + "beta_fast", 32.0, gt=0, le=MOST_FACTOR)
    beta_slow: float = about(_AT + "beta_slow", 1.0, gt=0, le=MOST_FACTOR)
    attention_factor: float | None = about(_AT + "attention_factor", None, gt=0, le=MOST_FACTOR)
    mscale: float | None = about(_AT + "mscale", None, gt=0, le=MOST_FACTOR)
    mscale_all_dim: float | None = about(_AT + "mscale_all_dim", None, gt=0, le=MOST_FACTOR)
    truncate: bool = about(_AT + "truncate", True)


class RopeLlama3(Section):
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, smooth between."""

    rope_type: Literal["llama3"] = about(_AT + "rope_type")
    rope_theta: float = about(_AT + "rope_theta", 500000.0, gt=0, le=MOST_THETA)
    factor: float = about(_AT + "factor", gt=0, le=MOST_FACTOR)
    low_freq_factor: float = about(_AT + "low_freq_factor", gt=0, le=MOST_FACTOR)
    high_freq_factor: float = about(_AT + "high_freq_factor", gt=0, le=MOST_FACTOR)
    original_max_position_embeddings: int = about(
        _AT + "original_max_position_embeddings", gt=0, le=MOST_TOKENS
    )


def _plain_rope(value: Any) -> Any:
    """`rope_type` may be left out, as Hugging Face allows; it then means `default`."""
    return {"rope_type": "default", **value} if isinstance(value, dict) else value


RopeParameters = Annotated[
    RopeDefault | RopeLinear | RopeNtk | RopeYarn | RopeLlama3,
    Field(discriminator="rope_type"),
    BeforeValidator(_plain_rope),
]
