"""What `--dry-run` says of the stages that adapt a model: sft, reward, dpo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmctl.kernels.cross_entropy import slice_tokens
from llmctl.locate import locate
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import target_names
from llmctl.model.checkpoint import FILES
from llmctl.model.leaves import leaves
from llmctl.plan.disk import refuse_small_disk, training_disk
from llmctl.plan.memory import adapter_training_bytes, training_bytes
from llmctl.plan.size import total_parameters
from llmctl.recipe.model import ModelSection
from llmctl.recipe.tune import DpoRecipe, RewardRecipe, SftRecipe
from llmctl.stages.costs import Work, plan, tokenizer_bytes
from llmctl.stages.tune import Base
from llmctl.train.loop import every, total_steps

NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # a weight of 4 bits, a scale of 8 for every 64, one of 32 for every 256 scales

TuningRecipe = SftRecipe | RewardRecipe | DpoRecipe


def plan_tuning(
    recipe: TuningRecipe, base: Base, out: Path, facts: dict[str, Any], rows: int, row_tokens: float
) -> dict[str, Any]:
    """The plan of a training whose data was read and checked in full.

    Args:
        facts: counts of the data, shown as they are.
        rows: of the training set; a pair of answers is one.
        row_tokens: tokens of a row, on average.

    Raises UserError if the disk is too small.
    """
    settings, spec = recipe.train, _spec(base)
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps = total_steps(settings, -(-rows // per_step))
    sides = 1 if isinstance(recipe, SftRecipe) else 2
    trained, memory = _memory(recipe, base, spec, sides)
    disk = tuning_disk(recipe, base, trained, steps)
    refuse_small_disk(out, disk)
    tokens = steps * per_step * row_tokens
    # adapters need no gradient of the weights they stand beside: forward twice, not three times
    work = Work(
        base.compute,
        trained=tokens if recipe.method == "full" else 2 * tokens / 3,
        read=rows * row_tokens if isinstance(recipe, DpoRecipe) else 0,  # the reference
        length=base.max_length,
        moved=total_parameters(spec) * 4,
    )
    shown = {
        "device": str(base.compute),
        "parameters": total_parameters(spec),
        "trained_parameters": trained,
        **facts,
        "steps": steps,
    }
    return plan(shown, work.seconds(spec), memory, disk, out, base.compute.device)


def tuning_disk(recipe: TuningRecipe, base: Base, trained: int, steps: int) -> dict[str, int]:
    """The most bytes on the disk at once; see `training_disk`."""
    settings = recipe.train
    return training_disk(
        trained,
        tokenizer_bytes(locate(base.where, FILES)),
        steps=steps,
        save_steps=every(steps, settings.save_steps),
        keep=settings.save_total_limit,
        best=getattr(settings, "early_stopping_patience", None) is not None,
    )


def _spec(base: Base) -> ModelSection:
    return base.config.spec.model_copy(update={"vocab_size": base.rows})


def _memory(recipe: TuningRecipe, base: Base, spec: ModelSection, sides: int) -> tuple[int, dict[str, int]]:
    """Trained parameters, and peak bytes by part; a pair has two `sides`, each a row."""
    settings, compute_bytes = recipe.train, base.compute.dtype.itemsize
    memory = training_bytes(
        spec,
        sides * settings.per_device_train_batch_size,
        base.max_length,
        compute_bytes,
        settings.gradient_checkpointing,
        slice_tokens(base.compute.device.type),
    )
    if recipe.method == "full":
        return total_parameters(spec), memory
    with torch.device("meta"):
        model = LlmctlForCausalLM(base.config)
    names = set(target_names(model, recipe.lora.target_modules))
    chosen = [leaf for leaf in leaves(model) if leaf.name.rsplit(".", 1)[-1] in names]
    trained = sum(recipe.lora.r * sum(leaf.shape) for leaf in chosen)
    tables = 1 if spec.tie_word_embeddings else 2  # rows of the embedding, and of a head of its own
    trained += tables * len(base.unseen) * spec.hidden_size
    return trained, adapter_training_bytes(
        spec,
        memory,
        trained=trained,
        matrix_bytes=NF4_BYTES if recipe.method == "qlora" else compute_bytes,
        compute_bytes=compute_bytes,
        trained_rows=bool(base.unseen),
        on_cpu=base.compute.device.type == "cpu",
    )
