"""Output head and cross-entropy in one step, a slice of tokens at a time.

The logits of a step are its largest tensor: tokens × vocabulary. Here only a slice of them exists at
once, and the gradient is taken while the slice is still in the cache, so the backward pass computes
no logits again (the idea of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989).

Shape legend: N tokens, E hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# tokens per slice: enough for full GEMM speed; on a CPU few enough for the logits to stay in its cache
SLICE = {"cpu": 256}
SLICE_ELSEWHERE = 4096


def linear_cross_entropy(
    h_NE: Tensor, w_VE: Tensor, labels_N: Tensor, rows: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Sum of negative log-likelihoods, in nats, over the tokens whose label is not -100.

    Args:
        h_NE: final hidden states.
        w_VE: output head, without bias.
        labels_N: the token each state should predict, or -100. Ignored tokens cost nothing: they
            are left out before the head.
        rows: indices [K] and values [K, E] that stand in place of those rows of the head. Then only the
            values get a gradient, which costs next to nothing beside one of the whole head.

    Under autocast the products run in the autocast dtype; softmax and sums are always float32.
    Equal to `linear_cross_entropy_reference` up to that rounding.
    """
    kept = (labels_N != IGNORE).nonzero().squeeze(1)
    h_NE, labels_N = h_NE.index_select(0, kept), labels_N.index_select(0, kept)
    device = h_NE.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_NE.dtype
    if not torch.is_grad_enabled():  # autograd asks for gradients by requires_grad alone
        h_NE, w_VE = h_NE.detach(), w_VE.detach()
    index_K, values_KE = (None, None) if rows is None else rows
    if values_KE is not None and not torch.is_grad_enabled():
        values_KE = values_KE.detach()
    return _LinearCrossEntropy.apply(h_NE, w_VE, labels_N, dtype, index_K, values_KE)


def slice_tokens(device: str) -> int:
    """Tokens whose logits exist at once on a kind of device."""
    return SLICE.get(device, SLICE_ELSEWHERE)


def linear_cross_entropy_reference(h_NE: Tensor, w_VE: Tensor, labels_N: Tensor) -> Tensor:
    """The definition: all logits, then torch's cross-entropy in float32."""
    logits_NV = F.linear(h_NE, w_VE).float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NE: Tensor,
        w_VE: Tensor,
        labels_N: Tensor,
        dtype: torch.dtype,
        index_K: Tensor | None,
        values_KE: Tensor | None,
    ) -> Tensor:
        # what is trained of the head: all of it, or the rows that stand in it
        trained = w_VE if values_KE is None else values_KE
        wants_h, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1 if values_KE is None else 5]
        total = torch.zeros((), dtype=torch.float32, device=h_NE.device)
        dh_NE = torch.empty(h_NE.shape, dtype=h_NE.dtype, device=h_NE.device) if wants_h else None
        d_head = torch.zeros(trained.shape, dtype=torch.float32, device=w_VE.device) if wants_head else None
        with torch.autocast(h_NE.device.type, enabled=False):
            w = w_VE.to(dtype, copy=values_KE is not None)
            if values_KE is not None:
                w.index_copy_(0, index_K, values_KE.to(dtype))
            size = slice_tokens(h_NE.device.type)
            for start in range(0, h_NE.shape[0], size):
                part = slice(start, start + size)
                h, labels = h_NE[part].to(dtype), labels_N[part, None]
                log_probabilities = (h @ w.T).float().log_softmax(-1)
                total -= log_probabilities.gather(1, labels).sum()
                if dh_NE is None and d_head is None:
                    continue
                # d nll / d logits = softmax - onehot(label)
                grad = log_probabilities.exp_()
                grad.scatter_add_(1, labels, torch.full_like(grad[:, :1], -1.0))
                grad = grad.to(dtype)
                if dh_NE is not None:
                    dh_NE[part] = grad @ w
                if d_head is not None:
                    d_head += (grad if index_K is None else grad[:, index_K]).T @ h
        ctx.save_for_backward(dh_NE, None if d_head is None else d_head.to(trained.dtype))
        ctx.by_rows = values_KE is not None
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dh_NE, d_head = ctx.saved_tensors
        dh, d_head = (None if grad is None else grad * upstream.to(grad.dtype) for grad in (dh_NE, d_head))
        d_w, d_values = (None, d_head) if ctx.by_rows else (d_head, None)
        return dh, d_w, None, None, None, d_values
