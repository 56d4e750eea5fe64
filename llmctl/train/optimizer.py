"""AdamW over the trainable parameters, decaying matrices only."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.recipe.train import StepsSection


def make_optimizer(model: nn.Module, settings: StepsSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused where torch has a fused kernel.

    Norm weights and biases are not decayed: pulling a scale towards zero is no regulariser.
    Raises ValueError if nothing is trainable, or no learning rate is set.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if not trainable or settings.learning_rate == "auto":
        raise ValueError("the model has no trainable parameter, or there is no learning rate")
    groups = [
        {"params": [w for w in trainable if w.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in trainable if w.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=trainable[0].device.type in ("cpu", "cuda"),
    )
