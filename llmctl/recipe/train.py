"""What every stage that takes optimizer steps is told, named as in Hugging Face TrainingArguments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmctl.recipe.base import Section, about
from llmctl.recipe.rates import Rate

Device = Literal["auto", "cpu", "cuda", "mps"]
Overlong = Literal["error", "drop", "truncate", "split"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]

MOST_THREADS = 1024  # more are a slip of the keyboard, and would end in an error of OpenMP


def _threads(value: Any) -> Any:
    """One sentence for both choices, where pydantic would tell of each; `null` of older recipes is auto."""
    if value is None:
        return "auto"
    if value == "auto" or (type(value) is int and 1 <= value <= MOST_THREADS):
        return value
    raise ValueError(f"`{value}` is neither a number of threads (1 to {MOST_THREADS:,}) nor auto")


Threads = Annotated[Annotated[int, Field(ge=1, le=MOST_THREADS)] | Literal["auto"], BeforeValidator(_threads)]


class StepsSection(Section):
    """The `train.*` fields that all training stages share; a stage's own class adds to them or narrows them."""

    max_steps: int | None = about("train.max_steps", None, ge=1)
    num_train_epochs: float = about("train.num_train_epochs", 1.0, gt=0)
    per_device_train_batch_size: int = about("train.per_device_train_batch_size", 16, ge=1)
    per_device_eval_batch_size: int = about("train.per_device_eval_batch_size", 16, ge=1)
    gradient_accumulation_steps: int = about("train.gradient_accumulation_steps", 1, ge=1)
    learning_rate: Rate = about("train.learning_rate", "auto")
    lr_scheduler_type: Schedule = about("train.lr_scheduler_type", "cosine")
    warmup_ratio: float = about("train.warmup_ratio", 0.02, ge=0, lt=1)
    min_lr_ratio: float = about("train.min_lr_ratio", 0.1, ge=0, le=1)
    weight_decay: float = about("train.weight_decay", 0.1, ge=0)
    adam_beta1: float = about("train.adam_beta1", 0.9, ge=0, lt=1)
    adam_beta2: float = about("train.adam_beta2", 0.95, ge=0, lt=1)
    adam_epsilon: float = about("train.adam_epsilon", 1e-8, gt=0)
    max_grad_norm: float = about("train.max_grad_norm", 1.0, gt=0)
    seed: int = about("train.seed", 0, ge=0)
    dtype: Dtype = about("train.dtype", "auto")
    gradient_checkpointing: bool = about("train.gradient_checkpointing", False)
    threads: Threads = about("train.threads", "auto")
    logging_steps: int = about("train.logging_steps", 10, ge=1)
    eval_steps: int | None = about("train.eval_steps", None, ge=1)
    save_steps: int | None = about("train.save_steps", None, ge=1)
    save_total_limit: int = about("train.save_total_limit", 2, ge=1)
