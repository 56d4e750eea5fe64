"""What a model moves by itself after an optimizer step, outside the gradient."""

from __future__ import annotations

from torch import nn

from llmctl.model.content import update_centroids
from llmctl.model.routers import balance_experts


def after_step(model: nn.Module) -> None:
    """Even out the loads of experts and move the centroids of routing attention; nothing for other layers.

    To be called once after each step of the optimizer: both go by what the step's forward passes have counted.
    """
    balance_experts(model)
    update_centroids(model)
