"""Recipes of the stages that adapt a model: SFT, reward model, DPO, and what is done with the results."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from llmctl.recipe.base import Mistake, Section, StageRecipe, about
from llmctl.recipe.columns import Columns
from llmctl.recipe.preference import DpoSection, PreferenceTrain, RewardSection
from llmctl.recipe.rates import chosen_rate
from llmctl.recipe.train import Device, Dtype, Overlong, StepsSection, Threads

Method = Literal["lora", "qlora", "full"]


def _targets(value: Any) -> Any:
    """One sentence for both choices, where pydantic would tell of each."""
    names = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if names or value == "all-linear":
        return value
    shown = f"; for one layer write [{value}]" if isinstance(value, str) else ""
    raise ValueError(f"`{value}` is neither all-linear nor a list of names{shown}")


class LoraSection(Section):
    """`lora.*`: low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = about("lora.r", 16, ge=1)
    alpha: float = about("lora.alpha", 32.0, gt=0)
    dropout: float = about("lora.dropout", 0.0, ge=0, lt=1)
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], BeforeValidator(_targets)
    ] = about("lora.target_modules", "all-linear")


T = TypeVar("T", bound=StepsSection)


def with_rate(train: T, stage: str, method: str, parameters: int) -> T:
    """A copy in which a learning rate of `auto` is a number."""
    auto = train.learning_rate == "auto"
    rate = chosen_rate(stage, method, parameters) if auto else train.learning_rate
    return train.model_copy(update={"learning_rate": rate})


def refuse_unused_adapter(method: Method, lora: LoraSection) -> None:
    """Raise ValueError for settings of an adapter in a run that has none."""
    if method == "full" and lora != LoraSection():
        raise ValueError("`lora` belongs to method lora or qlora; `full` trains the weights themselves")


def refuse_two_names(text_field: str, columns: dict[str, str], section: str) -> None:
    """Raise Mistake if both a field of text and columns are named: a record is read in one way."""
    if columns and text_field != "text":
        raise Mistake(
            "`text_field` and `columns` both say how a record is read",
            f"set {section}.columns alone; its role `text` names a column of plain text",
        )


class ConversationData(Section):
    """`data.*` of a stage that trains on conversations."""

    train: list[str] = about("data.train", [])
    eval: list[str] = about("data.eval", [])
    eval_fraction: float = about("data.eval_fraction", 0.05, ge=0, lt=1)
    columns: Columns = about("data.columns", {})
    template: str = about("data.template", "auto", min_length=1)
    max_length: int | None = about("data.max_length", None, gt=1)
    overlong: Overlong | None = about("data.overlong", None)


class PairData(ConversationData):
    """`data.*` of a stage that learns from preferences."""

    eval_fraction: float = about("data.eval_fraction", 0.1, ge=0, lt=1)


class SftData(ConversationData):
    """`data.*` of SFT."""

    text_field: str = about("data.text_field", "text")
    mask_prompt: bool = about("data.mask_prompt", True)
    rewritten: Literal["last", "split"] = about("data.rewritten", "last")
    packing: bool = about("data.packing", True)

    @model_validator(mode="after")
    def text_is_named_once(self) -> SftData:
        refuse_two_names(self.text_field, self.columns, "data")
        return self


class SftTrain(StepsSection):
    """`train.*` of SFT, in the one training loop."""

    num_train_epochs: float = about("train.num_train_epochs", 3.0, gt=0)
    per_device_train_batch_size: int = about("train.per_device_train_batch_size", 8, ge=1)
    warmup_ratio: float = about("train.warmup_ratio", 0.03, ge=0, lt=1)
    weight_decay: float = about("train.weight_decay", 0.0, ge=0)
    eval_max_rows: int | None = about("train.eval_max_rows", None, ge=1)
    sample_steps: int | None = about("train.sample_steps", None, ge=1)
    sample_tokens: int = about("train.sample_tokens", 64, ge=1)
    early_stopping_patience: int | None = about("train.early_stopping_patience", None, ge=1)


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

    def resolved(self, parameters: int) -> SftRecipe:
        """A copy with the learning rate filled in, for a base of that size."""
        return self.model_copy(update={"train": with_rate(self.train, "sft", self.method, parameters)})


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

    def resolved(self, parameters: int) -> Self:
        """A copy with the learning rate filled in, for a base of that size."""
        train = with_rate(self.train, self.stage_name, self.method, parameters)
        return self.model_copy(update={"train": train})


class RewardRecipe(PreferenceRecipe):
    """`llmctl reward MODEL`."""

    stage: Literal["reward"] = about("stage", "reward")
    reward: RewardSection = about("reward", RewardSection())


class DpoRecipe(PreferenceRecipe):
    """`llmctl dpo MODEL`."""

    stage: Literal["dpo"] = about("stage", "dpo")
    dpo: DpoSection = about("dpo", DpoSection())


class ScoreSection(Section):
    """`score.*`: what a reward model ranks."""

    data: list[str] = about("score.data", [])
    columns: Columns = about("score.columns", {})
    max_length: int | None = about("score.max_length", None, gt=1)
    batch_size: int = about("score.batch_size", 8, ge=1)
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
    columns: Columns = about("compare.columns", {})
    text_field: str = about("compare.text_field", "text")
    max_rows: int = about("compare.max_rows", 200, ge=1)
    max_tokens: int = about("compare.max_tokens", 4096, ge=1)
    max_length: int | None = about("compare.max_length", None, gt=1)
    batch_size: int = about("compare.batch_size", 8, ge=1)
    answers: int = about("compare.answers", 8, ge=0)
    max_new_tokens: int = about("compare.max_new_tokens", 64, ge=1)

    @model_validator(mode="after")
    def text_is_named_once(self) -> Self:
        refuse_two_names(self.text_field, self.columns, "compare")
        return self


class CompareSection(CompareRows):
    """`compare.*`: and how far apart they may be."""

    min_top1: float = about("compare.min_top1", 0.99, ge=0, le=1)
    max_kl: float | None = about("compare.max_kl", None, ge=0)
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

    min_effect: float = about("compare.min_effect", 1e-4, ge=0)


class MergeRecipe(StageRecipe):
    """`llmctl merge RUN`."""

    stage: Literal["merge"] = about("stage", "merge")
    out: str | None = about("out", None)
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    dtype: Dtype = about("dtype", "auto")
    compare: MergeSection = about("compare", MergeSection())
