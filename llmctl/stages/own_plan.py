"""The settings of a quickstart on a user's own data, chosen by the size of the data and the speed of the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmctl.recipe.rates import chosen_rate, shown

LENGTH_STEP = 64  # a row's tokens are a multiple of that
SHORTEST_ROW = 128
# A step takes a hundredth of all tokens that are trained on, so that there are about a hundred steps, but at least a few
# rows and at most what is usual for large data.
STEPS, FEWEST_TOKENS, MOST_TOKENS = 100, 256, 16384
IN_MEMORY = {"cpu": 2048, "cuda": 16384, "mps": 4096}  # tokens of one forward and backward pass
EPOCHS = ((200, 5.0), (2_000, 3.0), (20_000, 2.0))  # rows below which data is read so many times; above, once
RANKS = (
    (100_000, 8),
    (2_000_000, 16),
    (math.inf, 32),
)  # trained tokens up to which a rank holds what there is to learn
DPO_BATCH, DPO_STEPS, DPO_PER_STEP = 4, 40, 8  # pairs in memory; steps wanted; most pairs a step
SHORT_DPO, RAISED = (
    500,
    4.0,
)  # steps below which DPO takes so many times its usual rate, which would change nothing
EVALUATIONS = 2  # during a training
EVALUATED = 32  # rows, in each

# Work of a token against that of a training step of SFT, which goes forward and backward. DPO adds a forward pass of
# the reference and pads; reading is forward only, in float32 in proofs; decoding waits for memory.
DPO_WORK, READING, PROVING, DECODING = 1.7, 0.4, 1.0, 3.0
PROOF = {"compare.max_tokens": 2048, "compare.answers": 4}  # of merging and quantizing
PROOF_TOKENS = 2048 * 8  # that both read in all
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Sizes:
    """What settings are chosen by.

    Attributes:
        rows, tokens, trained_tokens, longest: of the training data; tokens per row are those of its rendered form.
        held, held_tokens: of the evaluation data.
        pairs, pair_tokens: of the preferences, both answers with the prompt before each; 0 where there are none.
        longest_pair: tokens of the longest row of a pair.
        parameters: of the model.
        limit: tokens the model can read.
        device: cpu, cuda or mps.
        seconds_per_token: of a training step, measured here.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    held: int
    held_tokens: int
    pairs: int
    pair_tokens: int
    longest_pair: int
    parameters: int
    limit: int
    device: str
    seconds_per_token: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What is set of the stages; steps are None where all epochs are trained."""

    max_length: int
    batch: int
    accumulation: int
    epochs: float
    steps: int
    max_steps: int | None
    rank: int
    dpo_rate: float | None
    dpo_length: int
    dpo_accumulation: int
    dpo_steps: int
    dpo_max_steps: int | None
    train_seconds: float
    other_seconds: float

    def sft(self) -> dict[str, Any]:
        """Fields of the recipe of SFT. The learning rate is the recipe's own choice."""
        return self._shared(self.steps, self.max_steps) | {
            "data.max_length": self.max_length,
            "train.num_train_epochs": None if self.max_steps else self.epochs,
            "train.per_device_train_batch_size": self.batch,
            "train.gradient_accumulation_steps": self.accumulation,
            "train.eval_max_rows": EVALUATED,
        }

    def dpo(self) -> dict[str, Any]:
        """Fields of the recipe of DPO."""
        return self._shared(self.dpo_steps, self.dpo_max_steps) | {
            "data.max_length": self.dpo_length,
            "train.per_device_train_batch_size": DPO_BATCH,
            "train.gradient_accumulation_steps": self.dpo_accumulation,
            "train.learning_rate": self.dpo_rate,
        }

    def _shared(self, steps: int, max_steps: int | None) -> dict[str, Any]:
        return {
            "lora.r": self.rank,
            "lora.alpha": 2.0 * self.rank,
            "train.max_steps": max_steps,
            "train.eval_steps": max(1, steps // EVALUATIONS),
            "train.logging_steps": max(1, min(10, steps // 10)),
        }


def choose(sizes: Sizes, minutes: float | None) -> Settings:
    """Settings for data of some size; trainings that would take longer than `minutes` in all are cut in proportion."""
    max_length = row_length(sizes.longest, sizes.limit)
    epochs = next((times for rows, times in EPOCHS if sizes.rows < rows), 1.0)
    per_step = min(max(epochs * sizes.tokens / STEPS, FEWEST_TOKENS), MOST_TOKENS)
    rows_a_step = max(1, round(per_step / max_length))
    batch = min(rows_a_step, max(1, IN_MEMORY.get(sizes.device, 2048) // max_length))
    accumulation = max(1, round(rows_a_step / batch))
    packed = math.ceil(sizes.tokens / max_length)
    steps = max(1, math.ceil(epochs * math.ceil(packed / (batch * accumulation))))
    dpo_accumulation = max(1, min(DPO_PER_STEP // DPO_BATCH, sizes.pairs // (DPO_BATCH * DPO_STEPS)))
    dpo_steps = math.ceil(sizes.pairs / (DPO_BATCH * dpo_accumulation))
    sft_seconds = sizes.seconds_per_token * epochs * sizes.tokens
    dpo_seconds = sizes.seconds_per_token * DPO_WORK * sizes.pair_tokens
    share = 1.0
    if minutes is not None and sft_seconds + dpo_seconds > 60 * minutes:
        share = 60 * minutes / (sft_seconds + dpo_seconds)
    return Settings(
        max_length=max_length,
        batch=batch,
        accumulation=accumulation,
        epochs=epochs,
        steps=max(1, int(share * steps)),
        max_steps=max(1, int(share * steps)) if share < 1 else None,
        dpo_rate=RAISED * chosen_rate("dpo", "lora", sizes.parameters) if dpo_steps < SHORT_DPO else None,
        rank=next(rank for most, rank in RANKS if sizes.trained_tokens <= most),
        dpo_length=row_length(sizes.longest_pair, sizes.limit),
        dpo_accumulation=dpo_accumulation,
        dpo_steps=max(1, int(share * dpo_steps)) if dpo_steps else 0,
        dpo_max_steps=max(1, int(share * dpo_steps)) if share < 1 and dpo_steps else None,
        train_seconds=share * (sft_seconds + dpo_seconds),
        other_seconds=_other_seconds(sizes),
    )


def row_length(longest: int, limit: int) -> int:
    """Tokens of a row that holds the longest record, as far as the model reads."""
    rounded = math.ceil(max(longest, SHORTEST_ROW) / LENGTH_STEP) * LENGTH_STEP
    return min(rounded, limit)


def _other_seconds(sizes: Sizes) -> float:
    """Of measuring every model, merging and quantizing."""
    models = 5 if sizes.pairs else 4
    read = 2 * sizes.held_tokens * models * READING + min(PROOF_TOKENS, 8 * sizes.held_tokens) * PROVING
    decoded = ANSWER_TOKENS * (12 * models + 16) * DECODING
    return sizes.seconds_per_token * (read + decoded)


def lines(sizes: Sizes, settings: Settings, minutes: float | None) -> list[str]:
    """The data and the settings, with the reason of each, for a person to read before anything starts."""
    said = [
        f"data: {sizes.rows:,} rows to train on, {sizes.tokens:,} tokens ({sizes.trained_tokens:,} of answers), "
        f"the longest {sizes.longest:,}; {sizes.held:,} rows to evaluate on"
        + (f"; {sizes.pairs:,} pairs" if sizes.pairs else ""),
        f"max_length {settings.max_length:,}: the longest row"
        + (f", cut at the model's limit of {sizes.limit:,}" if sizes.longest > sizes.limit else "")
        + "; shorter ones are packed together",
        f"a step takes {settings.batch * settings.accumulation:,} packed rows"
        f" ({settings.batch} at a time x {settings.accumulation}), so that small data makes up to {STEPS} steps",
        _sft_steps(sizes, settings, minutes),
        f"lora.r {settings.rank}: {sizes.trained_tokens:,} tokens of answers; learning rate of sft "
        f"{shown(chosen_rate('sft', 'lora', sizes.parameters))}: the usual one for {sizes.parameters:,} parameters",
    ]
    if sizes.pairs:
        cut = "" if settings.dpo_max_steps is None else f" (bounded by --minutes {minutes:g})"
        rate = settings.dpo_rate
        why = f" at a rate of {shown(rate)}: at the usual one so few would change nothing" if rate else ""
        said.append(f"dpo: {settings.dpo_steps:,} steps{cut}{why}")
    said.append(
        f"time on this machine: {about(settings.train_seconds)} to train, {about(settings.other_seconds)} to measure, merge and quantize"
    )
    if minutes is None and settings.train_seconds > 1800:
        said.append("--minutes N bounds the training")
    return said


def _sft_steps(sizes: Sizes, settings: Settings, minutes: float | None) -> str:
    if settings.max_steps is None:
        return f"sft: {settings.epochs:g} epochs, about {settings.steps:,} steps"
    seen = (
        settings.steps * settings.batch * settings.accumulation * settings.max_length / max(1, sizes.tokens)
    )
    return f"sft: {settings.steps:,} steps (bounded by --minutes {minutes:g}), {seen:.1f} of {settings.epochs:g} epochs"


def about(seconds: float) -> str:
    """`about 3 minutes`; `less than a minute`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    if minutes >= 120:
        return f"about {minutes / 60:.0f} hours"
    return f"about {minutes} minute{'s' if minutes > 1 else ''}"
