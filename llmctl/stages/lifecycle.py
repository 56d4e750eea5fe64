"""The stages of the quickstart, in order: what each is told, what it is made from, what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.evaluate.intervals import paired_interval
from llmctl.recipe.base import StageRecipe
from llmctl.recipe.load import load_recipe
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.recipe.schema import EvalRecipe, PretrainRecipe, TokenizerRecipe
from llmctl.recipe.tune import DpoRecipe, MergeRecipe, RewardRecipe, SftRecipe
from llmctl.runs import RunResult
from llmctl.stages import dpo, evaluate, merge, pretrain, quantize, reward, sft, tokenizer
from llmctl.talk import Talk

QUESTIONS = "builtin:tinyworld-instructions-heldout"  # about people no fine-tuning has met
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Step:
    """A stage of the lifecycle.

    Attributes:
        run: the stage; `kind` is the class of its recipe, and `shipped` the recipe's name, if it has one.
        fields: what is set beyond that, as `key=value` would.
        made_from: the step whose folder goes into the recipe's field `into`.
        trains: whether it takes a seed, and goes on from where it was interrupted.
        answers: whether the model it leaves is asked `QUESTIONS`.
        loss: the stage's metric that is its held-out loss; None where that of the answers counts.
        accuracy: the stage's metric that is the share of held-out preferences it keeps.
        size: what the result's size is the size of.
    """

    run: Callable[..., RunResult]
    kind: type[StageRecipe]
    shipped: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    made_from: str | None = None
    into: str = "base"
    trains: bool = False
    answers: bool = False
    loss: str | None = None
    accuracy: str | None = None
    size: str = WEIGHTS

    @property
    def stage(self) -> str:
        """The stage as manifests name it."""
        return str(self.kind.model_fields["stage"].default)

    def flags(self, name: str, folder: Path, seed: int | None, device: str | None) -> dict[str, Any]:
        """Field -> value of the step called `name` in a quickstart's folder; None where nothing is set."""
        flags: dict[str, Any] = {"out": str(folder / name), **self.fields}
        if "device" in self.kind.model_fields:
            flags["device"] = device
        if self.trains:
            flags["train.seed"] = seed
        if self.made_from is not None:
            flags[self.into] = str(folder / self.made_from)
        return flags

    def recipe(self, name: str, folder: Path, seed: int | None, device: str | None) -> Any:
        """The checked recipe of the step called `name` in a quickstart's folder. Raises UserError."""
        return load_recipe(self.kind, self.shipped, self.flags(name, folder, seed, device), [])


def measured(step: Step, result: RunResult, device: str | None, talk: Talk) -> dict[str, Any]:
    """The figures of a finished step; None where one does not apply.

    size_bytes; loss (nats per token, or per pair) and perplexity on held-out data; exact_match and
    preference_accuracy, shares with a 95 % interval in `…_low` and `…_high`; matches, which of `QUESTIONS`
    are answered to the letter.
    """
    assert result.path is not None
    found: dict[str, Any] = dict.fromkeys(FIGURES)
    found["size_bytes"] = sum(file.stat().st_size for file in result.path.glob(step.size))
    if step.accuracy is not None:
        for end in ("", "_low", "_high"):
            found[f"preference_accuracy{end}"] = result.metrics[f"{step.accuracy}{end}"]
    if step.answers:
        flags = {"base": str(result.path), "device": device, "eval.data": [QUESTIONS], "eval.answers": True}
        asked = evaluate.run(load_recipe(EvalRecipe, None, flags, []), talk)
        found |= {name: asked[name] for name in ANSWERED}
    if step.loss is not None:
        found["loss"] = result.metrics[step.loss]
        found["perplexity"] = math.exp(found["loss"]) if step.answers else None
    return found


def changed(steps: Mapping[str, Step], rows: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """How the exact answers of a step differ from those of the one it was made from, on the same questions.

    change, change_low and change_high, shares; change_from, the other step. Empty where there is no other.
    """
    above = steps[name].made_from
    if above is None or not (steps[name].answers and steps[above].answers):
        return {}
    before, after = ([bool(right) for right in rows[one]["matches"]] for one in (above, name))
    change, low, high = paired_interval(before, after)
    return {"change": change, "change_low": low, "change_high": high, "change_from": above}


ANSWERED = ("loss", "perplexity", "exact_match", "exact_match_low", "exact_match_high", "matches")
FIGURES = (
    "size_bytes",
    *ANSWERED,
    *("change", "change_low", "change_high", "change_from"),
    *("preference_accuracy", "preference_accuracy_low", "preference_accuracy_high"),
)

# A step's name is its folder's.
STEPS: dict[str, Step] = {
    "tokenizer": Step(tokenizer.run, TokenizerRecipe, "quickstart-tokenizer", size="tokenizer.json"),
    "pretrain": Step(
        pretrain.run,
        PretrainRecipe,
        "quickstart-pretrain",
        made_from="tokenizer",
        into="tokenizer",
        trains=True,
        answers=True,
        loss="eval_loss",
    ),
    "sft": Step(sft.run, SftRecipe, "sft-tinyworld", made_from="pretrain", trains=True, answers=True),
    "reward": Step(
        reward.run,
        RewardRecipe,
        "reward-tinyworld",
        made_from="sft",
        trains=True,
        loss="eval_loss",
        accuracy="eval_accuracy",
    ),
    "dpo": Step(
        dpo.run,
        DpoRecipe,
        "dpo-tinyworld",
        made_from="sft",
        trains=True,
        answers=True,
        accuracy="eval_accuracy",
    ),
    "merge": Step(merge.run, MergeRecipe, made_from="dpo", answers=True),
    "int8": Step(
        quantize.run,
        QuantizeRecipe,
        fields={"compare.data": [QUESTIONS]},
        made_from="merge",
        answers=True,
    ),
    "gptq4": Step(quantize.run, QuantizeRecipe, "quantize-tinyworld", made_from="merge", answers=True),
}
