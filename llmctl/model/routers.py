"""Routers: which experts a token goes to, with which weight, and what keeps the experts evenly used.

Shape legend: N real tokens, E width, X experts, K experts of one token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.recipe.experts import SparseExperts

TINY = 1e-20  # DeepSeek-V3's: sigmoids of a token can all be 0


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided. The losses are computed when they are asked for, unweighted.

    Attributes:
        logits: [N, X] float32, of the real tokens in their order; with the noise, where there is some.
        shares: [N, X], probabilities of a token over the experts; None where nothing is chosen, and
            loads need no balance.
        load: how many tokens each expert got, [X]; None where all experts are used alike.
    """

    logits: Tensor
    shares: Tensor | None = None
    load: Tensor | None = None

    @property
    def balance(self) -> Tensor:
        """X · Σ f_i · P_i, with f the tokens an expert got and P its mean share, both over N.

        1 x K when even (Fedus et al. 2021, arXiv:2101.03961; all K choices count, as in transformers'
        `load_balancing_loss_func` of one layer). 0 where loads need no balance.
        """
        if self.shares is None or self.load is None:
            return self.logits.new_zeros(())
        tokens, experts = max(self.shares.shape[0], 1), self.shares.shape[1]
        return experts * (self.load / tokens * (self.shares.sum(0) / tokens)).sum()

    @property
    def z(self) -> Tensor:
        """Mean of the squared logsumexp of the logits (ST-MoE, Zoph et al. 2022, arXiv:2202.08906, eq. 5)."""
        return self.logits.logsumexp(-1).square().sum() / max(self.logits.shape[0], 1)


@dataclass(frozen=True)
class Choice:
    """The experts of each token, [N, K] indices, and their weights [N, K] float32."""

    experts: Tensor
    weights: Tensor


class Router(nn.Module):
    """Logits [N, outputs] of tokens [N, E], in float32 whatever the model computes in.

    Not an `nn.Linear`: a few wrong bits of a router send tokens elsewhere, so no pass shall quantize it.
    """

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x_NE: Tensor) -> Tensor:
        with torch.autocast(x_NE.device.type, enabled=False):
            return F.linear(x_NE.float(), self.weight.float())

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class SparseRouter(Router):
    """The best `num_experts_per_tok` experts of each token, by score:

        softmax     Shazeer et al. 2017, arXiv:1701.06538, as Mixtral and Qwen3 have it
        sigmoid     DeepSeek-V3, arXiv:2412.19437

    `noisy` adds normal noise of a learned, input-dependent size to the logits in training (Shazeer et al.).
    `n_group` > 1 lets a token choose within `topk_group` groups only, those whose two best experts have the
    largest sum (DeepSeek-V3). `correction_bias` adds a bias to the scores that chooses and does not weigh,
    so that `balance_experts` can even out the loads without a loss.
    """

    e_score_correction_bias: Tensor | None
    counts: Tensor | None

    def __init__(self, experts: SparseExperts, width: int) -> None:
        super().__init__(experts.num_experts, width)
        self.spec, self.score = experts, SCORES[experts.scoring_func]
        self.noise = Router(experts.num_experts, width) if experts.noisy else None
        bias = torch.zeros(experts.num_experts, dtype=torch.float32) if experts.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        # made at the first count: a model made on the meta device would be given arbitrary numbers here
        self.register_buffer("counts", None, persistent=False)

    def forward(self, x_NE: Tensor) -> tuple[Choice, Routing]:
        logits = super().forward(x_NE)
        if self.noise is not None and self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x_NE))
        scores = self.score(logits)
        experts = self.choose(scores.detach())
        weights = scores.gather(1, experts)
        if self.spec.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        load = torch.bincount(experts.flatten(), minlength=scores.shape[1])
        self._count(load)
        shares = scores / (scores.sum(-1, keepdim=True) + TINY)
        return Choice(experts, weights * self.spec.routed_scaling_factor), Routing(logits, shares, load)

    def choose(self, scores_NX: Tensor) -> Tensor:
        """Indices [N, K] of the experts of each token."""
        if self.e_score_correction_bias is not None:
            scores_NX = scores_NX + self.e_score_correction_bias.float()
        groups = self.spec.n_group
        if groups > 1:
            by_group = scores_NX.unflatten(1, (groups, -1))
            best_NG = by_group.topk(min(2, by_group.shape[2]), dim=-1).values.sum(-1)
            kept = best_NG.topk(self.spec.topk_group, dim=-1).indices
            closed = torch.ones_like(best_NG, dtype=torch.bool).scatter_(1, kept, False)
            scores_NX = by_group.masked_fill(closed[:, :, None], -torch.inf).flatten(1)
        return scores_NX.topk(self.spec.num_experts_per_tok, dim=-1).indices

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move the bias of each expert up if it got less than the mean since the last call, down if more."""
        if self.e_score_correction_bias is None or self.counts is None:
            return
        load = self.counts.float()
        self.e_score_correction_bias += self.spec.bias_update_rate * (load.mean() - load).sign()
        self.counts.zero_()

    def _count(self, load: Tensor) -> None:
        # a frozen router belongs to the base of an adapter, which could not carry a bias that has moved
        trains = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if self.e_score_correction_bias is None or not trains:
            return
        # a pass that is computed again for its gradients (activation checkpointing) is counted twice; so is
        # every expert, and only the sign of a difference matters
        self.counts = load.clone() if self.counts is None else self.counts + load

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As of every module (`to`, `cuda`, `bfloat16` …), but the bias stays float32."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            # bfloat16 would lose the steps: next to 0.5 its numbers lie 0.002 apart
            self.e_score_correction_bias = after.float() if before.is_meta else before.to(after.device)
        return self


def balance_experts(model: nn.Module) -> None:
    """Move every correction bias of a model by `bias_update_rate` towards even loads, and count anew.

    To be called after each optimizer step (Wang et al. 2024, arXiv:2408.15664). Does nothing for routers
    without a bias, that are frozen, or that have seen no training since.
    """
    for router in [module for module in model.modules() if isinstance(module, SparseRouter)]:
        router.rebalance()


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": _softmax, "sigmoid": torch.sigmoid}
