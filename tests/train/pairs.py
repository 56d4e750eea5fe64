"""Preference pairs that a tiny model can tell apart, and jobs on them."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmctl.kernels.device import Compute
from llmctl.model.adapters import add_lora, load_adapter_weights, save_adapter
from llmctl.model.checkpoint import load_weights, new_model, save_model
from llmctl.model.classify import from_language_model
from llmctl.recipe.model import ModelSection
from llmctl.recipe.preference import DpoSection, PreferenceTrain, RewardSection
from llmctl.runs import METRICS
from llmctl.train.preference import PreferenceJob

SPEC = ModelSection(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=4096,
)
FLOAT = Compute(torch.device("cpu"), torch.float32)
PAD = 0
GOOD, BAD = 7, 8  # the last token of every chosen and of every rejected completion
KINDS = ("reward", "dpo")
OBJECTIVES = {"reward": RewardSection(), "dpo": DpoSection()}
FILES = {True: "adapter_model.safetensors", False: "model.safetensors"}


def pairs(count: int, kind: str, seed: int = 0, noise: int = 5) -> list[dict[str, Any]]:
    """Rows of unequal length as the trainer of `kind` takes them, fewer than `noise` tokens beside the telling one."""
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(10, 31) for _ in range(draw.randrange(1, most) if most else 0)]

    rows = [
        {"prompt_ids": tokens(6), "chosen_ids": [*tokens(noise), GOOD], "rejected_ids": [*tokens(noise), BAD]}
        for _ in range(count)
    ]
    return rows if kind == "dpo" else [whole(row) for row in rows]


def whole(row: dict[str, Any]) -> dict[str, Any]:
    """A DPO row as a reward model reads it."""
    return {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}


def flipped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs with the labels exchanged."""
    return [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]


def job(
    folder: Path, kind: str, *, lora: bool = False, dropout: float = 0.0, **settings: Any
) -> PreferenceJob:
    """21 pairs to train on in six steps an epoch, 10 to evaluate on."""
    folder.mkdir(exist_ok=True, parents=True)
    language = new_model(SPEC, seed=0, pad_token_id=PAD)
    model = from_language_model(language, seed=1) if kind == "reward" else language
    save, load = partial(save_model, model), partial(load_weights, model)
    if lora:
        torch.manual_seed(0)  # PEFT draws from the global generator
        task = "reward" if kind == "reward" else "causal"
        model = add_lora(model, r=4, alpha=8, dropout=dropout, target_modules="all-linear", task=task)
        save, load = partial(save_adapter, model), partial(load_adapter_weights, model)
    given = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "threads": 1}
    return PreferenceJob(
        model=model,
        objective=OBJECTIVES[kind],
        rows=pairs(21, kind),
        eval_rows=pairs(10, kind, seed=1),
        settings=PreferenceTrain(**{**given, **settings}),
        compute=FLOAT,
        folder=folder,
        pad_id=PAD,
        save=save,
        load=load,
    )


def weights(job: PreferenceJob) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in job.model.parameters()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
