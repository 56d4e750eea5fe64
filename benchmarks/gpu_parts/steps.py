"""One optimizer step, ours and a plain loop's over transformers' model, for checks and for timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llmctl.kernels.device import Compute
from llmctl.model.steps import after_step
from llmctl.recipe.schema import TrainSection
from llmctl.train.losses import causal_lm, trained_tokens
from llmctl.train.optimizer import make_optimizer

Batch = Mapping[str, Tensor]
Step = Callable[[Batch], Tensor]
SETTINGS = TrainSection(learning_rate=6e-4)


def our_step(model: nn.Module, compute: Compute, settings: TrainSection = SETTINGS) -> Step:
    """What `train/loop.py` does in a step of one micro-batch, its look at loss and gradient included."""
    model.train()
    optimizer = make_optimizer(model, settings)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def step(batch: Batch) -> Tensor:
        tokens = trained_tokens([dict(batch)])
        with compute.autocast():
            loss = causal_lm(model, moved(batch, compute.device), tokens)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, settings.max_grad_norm, foreach=True)
        if not math.isfinite(norm):
            raise ArithmeticError(f"the norm of the gradient is {float(norm)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(model)
        return loss.detach()

    return step


def plain_step(model: nn.Module, compute: Compute) -> Step:
    """What a hand-written loop over a transformers model does: autocast, fused AdamW, clipping, nothing else."""
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batch: Batch) -> Tensor:
        given = moved({name: batch[name] for name in ("input_ids", "labels")}, compute.device)
        with compute.autocast():
            loss = model(**given, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch on the device, as the loop moves it."""
    if device.type != "cuda":
        return {name: value.to(device) for name, value in batch.items()}
    return {name: value.pin_memory().to(device, non_blocking=True) for name, value in batch.items()}
