"""What a conversion is told."""

from __future__ import annotations

from typing import Literal

from llmctl.recipe.base import StageRecipe, about
from llmctl.recipe.model import Family
from llmctl.recipe.train import Dtype, Threads


class ConvertRecipe(StageRecipe):
    """`llmctl convert MODEL`."""

    stage: Literal["convert"] = about("stage", "convert")
    out: str | None = about("out", None)
    base: str | None = about("base", None)
    family: Family | None = about("family", None)
    dtype: Dtype = about("dtype", "auto")
    allow_pickle: bool = about("allow_pickle", False)
    threads: Threads = about("threads", "auto")
