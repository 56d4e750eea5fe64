"""What learning from preferences is told: a reward model's training, and DPO's."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmctl.recipe.base import Section, about
from llmctl.recipe.train import StepsSection

DpoLoss = Literal["sigmoid", "ipo", "hinge", "robust"]


class PreferenceTrain(StepsSection):
    """`train.*` of a stage that learns from pairs, in TRL's trainers; a row is a pair."""

    per_device_train_batch_size: int = about("train.per_device_train_batch_size", 8, ge=1)
    per_device_eval_batch_size: int = about("train.per_device_eval_batch_size", 8, ge=1)
    warmup_ratio: float = about("train.warmup_ratio", 0.1, ge=0, lt=1)
    weight_decay: float = about("train.weight_decay", 0.0, ge=0)
    adam_beta2: float = about("train.adam_beta2", 0.999, ge=0, lt=1)


class RewardSection(Section):
    """`reward.*`: the Bradley-Terry loss of a reward model."""

    center_rewards_coefficient: float = about("reward.center_rewards_coefficient", 0.01, ge=0)


class DpoSection(Section):
    """`dpo.*`: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: float = about("dpo.beta", 0.1, gt=0)
    loss_type: DpoLoss = about("dpo.loss_type", "sigmoid")
    label_smoothing: float = about("dpo.label_smoothing", 0.0, ge=0, lt=0.5)

    @model_validator(mode="after")
    def smoothing_is_used(self) -> DpoSection:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"`label_smoothing` belongs to loss_type `robust`; `{self.loss_type}` would ignore it"
            )
        return self
