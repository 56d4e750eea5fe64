"""Losses: rows of one table through the one loop.

A loss takes the model, a micro-batch and the number of trained tokens in the *whole* optimizer
step, and returns its share of the step's mean loss. Summed over the micro-batches that is the loss
per trained token, however the tokens are spread over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from llmctl.kernels.cross_entropy import IGNORE

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch, int], Tensor]


def causal_lm(model: nn.Module, batch: Batch, trained_tokens: int) -> Tensor:
    """Next-token cross-entropy in nats. `batch` holds what `data.batches.collate` makes, [B, T] each.

    Works for a bare model and for one wrapped by PEFT alike: both take Hugging Face's keywords.
    """
    return model(**batch, num_items_in_batch=trained_tokens, skip_logits=True, use_cache=False).loss


def trained_tokens(batches: list[dict[str, Tensor]]) -> int:
    """Labels that are trained over the micro-batches of a step; a row's first token has no predecessor."""
    return sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)


LOSSES: dict[str, Loss] = {"causal_lm": causal_lm}
