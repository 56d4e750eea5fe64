"""How text is written: the settings of sampling, and the recipe that continues one prompt."""

from __future__ import annotations

from typing import Literal

from llmctl.recipe.base import Section, StageRecipe, about
from llmctl.recipe.ranges import MOST_ENTRIES, MOST_SEED, MOST_TEMPERATURE, MOST_TOKENS
from llmctl.recipe.train import Device, Dtype, Threads


class SamplingSection(Section):
    """What every stage that writes text is told; a stage's own class adds to it or sets other defaults."""

    max_new_tokens: int = about("generate.max_new_tokens", 128, ge=1, le=MOST_TOKENS)
    temperature: float = about("generate.temperature", 0.8, ge=0, le=MOST_TEMPERATURE)
    top_k: int | None = about("generate.top_k", None, ge=1, le=MOST_ENTRIES)
    top_p: float = about("generate.top_p", 1.0, gt=0, le=1)
    seed: int = about("generate.seed", 0, ge=0, le=MOST_SEED)
    ignore_eos: bool = about("generate.ignore_eos", False)
    dtype: Dtype = about("generate.dtype", "auto")
    threads: Threads = about("generate.threads", "auto")


class GenerateSection(SamplingSection):
    """`generate.*`."""

    chat: bool = about("generate.chat", False)


class GenerateRecipe(StageRecipe):
    """`llmctl generate MODEL PROMPT`."""

    stage: Literal["generate"] = about("stage", "generate")
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    generate: GenerateSection = about("generate", GenerateSection())
