"""Recipes of the stages that adapt a model: SFT, reward model, DPO, and what is done with the results."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmctl.recipe.base import Section, StageRecipe, about
from llmctl.recipe.preference import DPO_RATES, REWARD_RATES, DpoSection, PreferenceTrain, RewardSection
from llmctl.recipe.ranges import (
    MAX_DOCUMENT_MB,
    MOST_EPOCHS,
    MOST_FACTOR,
    MOST_MEGABYTES,
    MOST_NATS,
    MOST_PARTS,
    MOST_RATE,
    MOST_ROWS,
    MOST_STEPS,
    MOST_TOKENS,
)
from llmctl.recipe.train import Device, Dtype, Overlong, StepsSection, Threads

Method = Literal["lora", "qlora", "full"]

# peak learning rates where the recipe sets none: an adapter takes about ten times that of full training
SFT_RATES: dict[str, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}


def _targets(value: Any) -> Any:
    """One sentence for both choices, where pydantic would tell of each."""
    names = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if names or value == "all-linear":
        return value
    shown = f"; for one layer write [{value}]" if isinstance(value, str) else ""
    raise ValueError(f"`{value}` is neither all-linear nor a list of names{shown}")


class LoraSection(Section):
    """`lora.*`: low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = about("lora.r", 16, ge=1, le=MOST_PARTS)
    alpha: float = about("lora.alpha", 32.0, gt=0, le=MOST_FACTOR)
    dropout: float = about("lora.dropout", 0.0, ge=0, lt=1)
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], BeforeValidator(_targets)
    ] = about("lora.target_modules", "all-linear")


def refuse_unused_adapter(method: Method, lora: LoraSection) -> None:
    """Raise ValueError for settings of an adapter in a run that has none."""
    if method == "full" and lora != LoraSection():
        raise ValueError("`lora` belongs to method lora or qlora; `full` trains the weights themselves")


class ConversationData(Section):
    """`data.*` of a stage that trains on conversations."""

    train: list[str] = about("data.train", [])
    eval: list[str] = about("data.eval", [])
    eval_fraction: float = about("data.eval_fraction", 0.05, ge=0, lt=1)
    template: str = about("data.template", "auto", min_length=1)
    max_length: int | None = about("data.max_length", None, gt=1, le=MOST_TOKENS)
    overlong: Overlong | None = about("data.overlong", None)
    max_document_mb: float = about("data.max_document_mb", MAX_DOCUMENT_MB, gt=0, le=MOST_MEGABYTES)


class PairData(ConversationData):
    """`data.*` of a stage that learns from preferences."""

    eval_fraction: float = about("data.eval_fraction", 0.1, ge=0, lt=1)


class SftData(ConversationData):
    """`data.*` of SFT."""

    text_field: str = about("data.text_field", "text")
    mask_prompt: bool = about("data.mask_prompt", True)
    rewritten: Literal["last", "split"] = about("data.rewritten", "last")
    packing: bool = about("data.packing", True)


class SftTrain(StepsSection):
    """`train.*` of SFT, in the one training loop."""

    num_train_epochs: float = about("train.num_train_epochs", 3.0, gt=0, le=MOST_EPOCHS)
    per_device_train_batch_size: int = about("train.per_device_train_batch_size", 8, ge=1, le=MOST_ROWS)
    warmup_ratio: float = about("train.warmup_ratio", 0.03, ge=0, lt=1)
    weight_decay: float = about("train.weight_decay", 0.0, ge=0, le=MOST_RATE)
    eval_max_rows: int | None = about("train.eval_max_rows", None, ge=1, le=MOST_STEPS)
    sample_steps: int | None = about("train.sample_steps", None, ge=1, le=MOST_STEPS)
    sample_tokens: int = about("train.sample_tokens", 64, ge=1, le=MOST_TOKENS)
    early_stopping_patience: int | None = about("train.early_stopping_patience", None, ge=1, le=MOST_STEPS)


class SftRecipe(StageRecipe):
    """`llmctl sft MODEL`."""

    stage: Literal["sft"] = about("stage", "sft")
    out: str | None = about("out", None)
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    method: Method = about("method", "lora")
    lora: LoraSection = about("lora", LoraSection())
    data: SftData = about("data", SftData())
    train: SftTrain = about("train", SftTrain())

    @model_validator(mode="after")
    def adapter_is_used(self) -> SftRecipe:
        refuse_unused_adapter(self.method, self.lora)
        return self

    def resolved(self) -> SftRecipe:
        """A copy with the learning rate filled in."""
        rate = self.train.learning_rate or SFT_RATES[self.method]
        return self.model_copy(update={"train": self.train.model_copy(update={"learning_rate": rate})})


class PreferenceRecipe(StageRecipe):
    """What the stages that learn from preferences share."""

    out: str | None = about("out", None)
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    method: Method = about("method", "lora")
    lora: LoraSection = about("lora", LoraSection())
    data: PairData = about("data", PairData())
    train: PreferenceTrain = about("train", PreferenceTrain())

    @model_validator(mode="after")
    def adapter_is_used(self) -> Self:
        refuse_unused_adapter(self.method, self.lora)
        return self

    def _with_rate(self, rates: dict[str, float]) -> Self:
        rate = self.train.learning_rate or rates[self.method]
        return self.model_copy(update={"train": self.train.model_copy(update={"learning_rate": rate})})


class RewardRecipe(PreferenceRecipe):
    """`llmctl reward MODEL`."""

    stage: Literal["reward"] = about("stage", "reward")
    reward: RewardSection = about("reward", RewardSection())

    def resolved(self) -> RewardRecipe:
        """A copy with the learning rate filled in."""
        return self._with_rate(REWARD_RATES)


class DpoRecipe(PreferenceRecipe):
    """`llmctl dpo MODEL`."""

    stage: Literal["dpo"] = about("stage", "dpo")
    dpo: DpoSection = about("dpo", DpoSection())

    def resolved(self) -> DpoRecipe:
        """A copy with the learning rate filled in."""
        return self._with_rate(DPO_RATES)


class ScoreSection(Section):
    """`score.*`: what a reward model ranks."""

    data: list[str] = about("score.data", [])
    max_length: int | None = about("score.max_length", None, gt=1, le=MOST_TOKENS)
    max_document_mb: float = about("score.max_document_mb", MAX_DOCUMENT_MB, gt=0, le=MOST_MEGABYTES)
    batch_size: int = about("score.batch_size", 8, ge=1, le=MOST_ROWS)
    dtype: Dtype = about("score.dtype", "float32")
    threads: Threads = about("score.threads", "auto")


class ScoreRecipe(StageRecipe):
    """`llmctl score MODEL`."""

    stage: Literal["score"] = about("stage", "score")
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    score: ScoreSection = about("score", ScoreSection())


class CompareRows(Section):
    """`compare.*`: what two models are held against each other on."""

    data: list[str] = about("compare.data", [])
    text_field: str = about("compare.text_field", "text")
    max_document_mb: float = about("compare.max_document_mb", MAX_DOCUMENT_MB, gt=0, le=MOST_MEGABYTES)
    max_rows: int = about("compare.max_rows", 200, ge=1, le=MOST_STEPS)
    max_tokens: int = about("compare.max_tokens", 4096, ge=1, le=MOST_TOKENS)
    max_length: int | None = about("compare.max_length", None, gt=1, le=MOST_TOKENS)
    batch_size: int = about("compare.batch_size", 8, ge=1, le=MOST_ROWS)
    answers: int = about("compare.answers", 8, ge=0, le=MOST_STEPS)
    max_new_tokens: int = about("compare.max_new_tokens", 64, ge=1, le=MOST_TOKENS)


class CompareSection(CompareRows):
    """`compare.*`: and how far apart they may be."""

    min_top1: float = about("compare.min_top1", 0.99, ge=0, le=1)
    max_kl: float | None = about("compare.max_kl", None, ge=0, le=MOST_NATS)
    dtype: Dtype = about("compare.dtype", "float32")
    threads: Threads = about("compare.threads", "auto")


class CompareRecipe(StageRecipe):
    """`llmctl compare A B`."""

    stage: Literal["compare"] = about("stage", "compare")
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    other: str | None = about("other", None)
    compare: CompareSection = about("compare", CompareSection())


class MergeSection(CompareSection):
    """`compare.*` of a merge: adapter against merged, and base against adapter."""

    min_effect: float = about("compare.min_effect", 1e-4, ge=0, le=MOST_NATS)


class MergeRecipe(StageRecipe):
    """`llmctl merge RUN`."""

    stage: Literal["merge"] = about("stage", "merge")
    out: str | None = about("out", None)
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    dtype: Dtype = about("dtype", "auto")
    compare: MergeSection = about("compare", MergeSection())
