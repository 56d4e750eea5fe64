"""The recipes, one class a stage. Defaults are written here and nowhere else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmctl.recipe.base import Section, StageRecipe, about
from llmctl.recipe.chat import ChatRecipe
from llmctl.recipe.convert import ConvertRecipe
from llmctl.recipe.generate import GenerateRecipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.recipe.ranges import (
    MAX_DOCUMENT_MB,
    MOST_ENTRIES,
    MOST_MEGABYTES,
    MOST_RATE,
    MOST_ROWS,
    MOST_STEPS,
    MOST_TOKENS,
)
from llmctl.recipe.train import Device, Dtype, Overlong, StepsSection, Threads
from llmctl.recipe.tune import CompareRecipe, DpoRecipe, MergeRecipe, RewardRecipe, ScoreRecipe, SftRecipe

TokenizerKind = Literal["byte-bpe", "bpe", "wordpiece", "unigram", "sentencepiece", "word", "char"]
CACHE_DIR = "~/.cache/llmctl"


class DataSection(Section):
    """`data.*` of a stage that trains on text."""

    train: list[str] = about("data.train", [])
    eval: list[str] = about("data.eval", [])
    eval_fraction: float = about("data.eval_fraction", 0.01, ge=0, lt=1)
    text_field: str = about("data.text_field", "text")
    max_length: int | None = about("data.max_length", None, gt=1, le=MOST_TOKENS)
    overlong: Overlong = about("data.overlong", "split")
    packing: bool = about("data.packing", True)
    isolate_documents: bool = about("data.isolate_documents", True)
    max_document_mb: float = about("data.max_document_mb", MAX_DOCUMENT_MB, gt=0, le=MOST_MEGABYTES)
    cache_dir: str = about("data.cache_dir", CACHE_DIR)


class TrainSection(StepsSection):
    """`train.*` of the one training loop."""

    learning_rate: float = about("train.learning_rate", 1e-3, gt=0, le=MOST_RATE)
    torch_compile: bool = about("train.torch_compile", False)
    eval_max_rows: int | None = about("train.eval_max_rows", None, ge=1, le=MOST_STEPS)


class TokenizerData(Section):
    """`data.*` of a tokenizer recipe: documents only, nothing is cut into rows."""

    train: list[str] = about("data.train", [])
    text_field: str = about("data.text_field", "text")
    max_document_mb: float = about("data.max_document_mb", MAX_DOCUMENT_MB, gt=0, le=MOST_MEGABYTES)


class TokenizerRecipe(StageRecipe):
    """`llmctl tokenizer train`."""

    stage: Literal["tokenizer"] = about("stage", "tokenizer")
    out: str | None = about("out", None)
    kind: TokenizerKind = about("kind", "byte-bpe")
    vocab_size: int = about("vocab_size", 8192, ge=1, le=MOST_ENTRIES)
    min_frequency: int = about("min_frequency", 2, ge=1, le=MOST_STEPS)
    chat_template: Literal["chatml", "none"] = about("chat_template", "chatml")
    data: TokenizerData = Field(TokenizerData(), description="what to learn from")


class PretrainRecipe(StageRecipe):
    """`llmctl pretrain [MODEL]`."""

    stage: Literal["pretrain"] = about("stage", "pretrain")
    out: str | None = about("out", None)
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    tokenizer: str | None = about("tokenizer", None)
    model: ModelSection | None = about("model", None)
    data: DataSection = about("data", DataSection())
    train: TrainSection = about("train", TrainSection())

    @model_validator(mode="after")
    def one_origin(self) -> PretrainRecipe:
        if self.base is not None and self.model is not None:
            raise ValueError("`model` describes a new model, but `base` continues an existing one; drop one")
        return self

    @model_validator(mode="after")
    def lengths_fit(self) -> PretrainRecipe:
        model = self.model
        if model is None:
            return self
        longest, asked = model.max_position_embeddings, self.data.max_length
        if asked is not None and asked > longest:
            raise ValueError(
                f"data.max_length is {asked}, but model.max_position_embeddings is {longest}"
                + (", and learned positions end there" if model.position == "learned" else "")
            )
        if model.sliding_window is not None and model.sliding_window > longest:
            raise ValueError(
                f"model.sliding_window ({model.sliding_window}) is larger than the context "
                f"(model.max_position_embeddings, {longest}): such layers would be `full`"
            )
        return self


class EvalSection(Section):
    """`eval.*`."""

    data: list[str] = about("eval.data", [])
    answers: bool = about("eval.answers", False)
    text_field: str = about("eval.text_field", "text")
    max_length: int | None = about("eval.max_length", None, gt=1, le=MOST_TOKENS)
    max_document_mb: float = about("eval.max_document_mb", MAX_DOCUMENT_MB, gt=0, le=MOST_MEGABYTES)
    batch_size: int = about("eval.batch_size", 16, ge=1, le=MOST_ROWS)
    max_rows: int | None = about("eval.max_rows", None, ge=1, le=MOST_STEPS)
    dtype: Dtype = about("eval.dtype", "float32")
    threads: Threads = about("eval.threads", "auto")
    cache_dir: str = about("eval.cache_dir", CACHE_DIR)


class EvalRecipe(StageRecipe):
    """`llmctl eval MODEL`."""

    stage: Literal["eval"] = about("stage", "eval")
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    eval: EvalSection = about("eval", EvalSection())


# The stages a recipe file may name. A new stage is a class above and a line here.
RECIPES: dict[str, type[StageRecipe]] = {
    "tokenizer": TokenizerRecipe,
    "pretrain": PretrainRecipe,
    "sft": SftRecipe,
    "reward": RewardRecipe,
    "dpo": DpoRecipe,
    "score": ScoreRecipe,
    "merge": MergeRecipe,
    "compare": CompareRecipe,
    "convert": ConvertRecipe,
    "quantize": QuantizeRecipe,
    "generate": GenerateRecipe,
    "chat": ChatRecipe,
    "eval": EvalRecipe,
}

AnyRecipe = Annotated[
    TokenizerRecipe
    | PretrainRecipe
    | SftRecipe
    | RewardRecipe
    | DpoRecipe
    | ScoreRecipe
    | MergeRecipe
    | CompareRecipe
    | ConvertRecipe
    | QuantizeRecipe
    | GenerateRecipe
    | ChatRecipe
    | EvalRecipe,
    Field(discriminator="stage"),
]
