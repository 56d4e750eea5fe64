"""TRL's trainers on finished rows. What TRL computes stays TRL's; what it would read, cut, print or send does not.

Importing this takes seconds, so `preference.py` does it only when a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as DpoCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from llmctl.kernels.threads import Work, timed
from llmctl.recipe.preference import DpoSection, RewardSection
from llmctl.train.checkpoint import load_rng

Rows = list[dict[str, Any]]
REFERENCE = Work("computing the reference", "tokens")


@dataclass
class Seen:
    """What one micro-batch gave: the mean loss of its pairs, tokens read, and TRL's means under our names."""

    loss: Tensor
    pairs: int
    tokens: int
    figures: dict[str, float]


class _OnRows:
    """What both trainers do otherwise than TRL's. `watch` is told of every micro-batch that is trained on."""

    FIGURES: ClassVar[dict[str, str]]  # our name -> TRL's

    def __init__(self, watch: Callable[[Seen], None], *args: Any, **kwargs: Any) -> None:
        self.watch = watch
        self.step_batches: list[dict[str, Tensor]] = []
        super().__init__(*args, **kwargs)
        self.processing_class = None  # a stand-in, to which `train` would align the model's special tokens

    def measure(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Seen:
        """Loss and figures of a micro-batch, in whichever mode the model is."""
        tokens = int(inputs["attention_mask"].sum())
        loss = super().compute_loss(model, inputs)
        found = self._metrics["train" if self.model.training else "eval"]
        figures = {ours: float(found[theirs][-1]) for ours, theirs in self.FIGURES.items()}
        found.clear()
        return Seen(loss, len(inputs["input_ids"]) // 2, tokens, figures)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The micro-batch's share of the step's mean over pairs, times the micro-batches it is divided by.

        The trainer would take the mean of the micro-batches' means, in which the pairs of a short last
        one weigh more.
        """
        seen = self.measure(model, inputs)
        self.watch(seen)
        pairs = sum(len(batch["input_ids"]) // 2 for batch in self.step_batches)
        return seen.loss * (seen.pairs * len(self.step_batches) / pairs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Any]:
        found = super().get_batch_samples(*args, **kwargs)
        self.step_batches = found[0]
        return found

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Nothing: `preference.py` writes metrics.jsonl."""

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    # The caller has put weights, optimizer and schedule back before `train`; only the random state has
    # to come back later, once the trainer has skipped the batches that were seen.
    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng(checkpoint)


class RewardOnRows(_OnRows, RewardTrainer):
    """TRL's reward trainer on rows of `chosen_ids` and `rejected_ids`."""

    FIGURES: ClassVar[dict[str, str]] = {
        "accuracy": "accuracy",
        "margin": "margin",
        "mean_reward": "mean_reward",
    }


class DpoOnRows(_OnRows, DPOTrainer):
    """TRL's DPO trainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    FIGURES: ClassVar[dict[str, str]] = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "chosen_logps": "logps/chosen",
        "rejected_logps": "logps/rejected",
    }

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # `reference` is called instead, and its result kept with the run

    @torch.no_grad()
    def reference(self, rows: Rows, batch_size: int, tell: Callable[[int], None]) -> Tensor:
        """Summed log-probabilities of chosen and rejected under the model as it is now, [rows, 2] on the CPU.

        `tell` is told how many rows were done.
        """
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["chosen_ids"]))
        found = torch.zeros(len(rows), 2)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self._prepare_inputs(self.data_collator([rows[row] for row in chosen]))
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            with self.accelerator.autocast(), timed(REFERENCE, labels.numel()):
                out = self.model(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    labels=labels,
                    use_cache=False,
                    fused_lm_head=True,
                )
            sums = out.log_probs.float().sum(dim=1)
            found[chosen] = torch.stack(sums.chunk(2), dim=1).cpu()
            tell(len(chosen))
        return found


def batches(trainer: RewardOnRows | DpoOnRows, rows: Rows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Rows in order as padded tensors on the trainer's device."""
    for start in range(0, len(rows), batch_size):
        yield trainer._prepare_inputs(trainer.data_collator(rows[start : start + batch_size]))


@dataclass
class Setup:
    """What a trainer is made from, beyond the model and the objective.

    Attributes:
        pad_id: a token to fill rows with; it is masked.
        arguments: fields of transformers' TrainingArguments.
        optimizers: optimizer and learning-rate schedule.
        callback: called back at every step.
    """

    rows: Rows
    pad_id: int
    arguments: dict[str, Any]
    optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]
    callback: TrainerCallback


def make_trainer(
    model: PreTrainedModel,
    objective: RewardSection | DpoSection,
    setup: Setup,
    watch: Callable[[Seen], None],
) -> RewardOnRows | DpoOnRows:
    """The trainer for an objective. The model's config is left as it was.

    `model` is a plain one, adapters inside it or not: of PEFT's own wrapper, TRL's DPO would train a copy.
    """
    kind, collator, arguments = TRAINERS[type(objective)](objective, setup)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # this program computes on one device
    configs = [model.config, *([model.generation_config] if model.can_generate() else [])]
    before = [dict(vars(config)) for config in configs]
    trainer = kind(
        watch,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(setup.rows),
        data_collator=collator,
        processing_class=_stand_in(),
        optimizers=setup.optimizers,
        callbacks=[setup.callback],
    )
    for config, held in zip(configs, before, strict=True):
        vars(config).clear()
        vars(config).update(held)
    return trainer


def _reward(
    objective: RewardSection, setup: Setup
) -> tuple[type[RewardOnRows], RewardCollator, RewardConfig]:
    arguments = RewardConfig(
        **setup.arguments,
        max_length=None,
        disable_dropout=False,
        center_rewards_coefficient=objective.center_rewards_coefficient or None,
    )
    return RewardOnRows, RewardCollator(pad_token_id=setup.pad_id), arguments


def _dpo(objective: DpoSection, setup: Setup) -> tuple[type[DpoOnRows], DpoCollator, DPOConfig]:
    arguments = DPOConfig(
        **setup.arguments,
        max_length=None,
        disable_dropout=False,
        precompute_ref_log_probs=True,
        beta=objective.beta,
        loss_type=[objective.loss_type],
        label_smoothing=objective.label_smoothing,
    )
    return DpoOnRows, DpoCollator(pad_token_id=setup.pad_id, max_length=None), arguments


def _stand_in() -> PreTrainedTokenizerFast:
    """A tokenizer of one word. TRL asks for one, and would change the run's own; finished rows need none."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")  # noqa: S106


# objective -> its trainer, collator and arguments
TRAINERS: dict[type, Callable[[Any, Setup], tuple[type, Any, Any]]] = {
    RewardSection: _reward,
    DpoSection: _dpo,
}
