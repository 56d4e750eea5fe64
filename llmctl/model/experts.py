"""Several feed-forward layers in the place of one: [B, T, E] -> [B, T, E], and what the router decided.

Shape legend: B rows, T new tokens, N real tokens of all rows (padding left out), E width, X experts, K experts
of one token, A assignments of a token to an expert, P slots of one expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmctl.kernels.grouped import grouped_linear
from llmctl.model.context import Context
from llmctl.model.ffn import FFNS, Gated
from llmctl.model.routers import Router, Routing, SparseRouter
from llmctl.recipe.experts import ExpertChoice, SlotExperts, SparseExperts
from llmctl.recipe.model import ModelSection


class Experts(nn.Module, ABC):
    """What all kinds share: experts that are ordinary feed-forward layers, a router, and shared experts.

    Padding is routed nowhere: routed experts give 0 there, and it counts in no loss and no load.
    """

    def __init__(self, model: ModelSection, gate: Router) -> None:
        super().__init__()
        assert model.experts is not None
        make, inner, shared = FFNS[model.ffn], model.intermediate_of_expert, model.experts.n_shared_experts
        self.gate = gate
        self.experts = nn.ModuleList(make(model, inner) for _ in range(model.experts.num_experts))
        self.shared_experts = make(model, shared * inner) if shared else None

    def forward(self, x_BTE: Tensor, ctx: Context) -> tuple[Tensor, Routing]:
        real_N, x_NE = None, x_BTE.flatten(0, 1)
        padding = ctx.padding()
        if padding is not None and bool(padding.any()):
            real_N = (~padding).flatten().nonzero().squeeze(1)
            x_NE = x_NE[real_N]
        y_NE, routing = self.route(x_NE, ctx, real_N)
        y_NE = y_NE.to(x_BTE.dtype)
        if real_N is not None:
            y_NE = y_NE.new_zeros(x_BTE.shape).flatten(0, 1).index_copy(0, real_N, y_NE)
        y_BTE = y_NE.view_as(x_BTE)
        return y_BTE if self.shared_experts is None else y_BTE + self.shared_experts(x_BTE), routing

    @abstractmethod
    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        """What the routed experts give, [N, E] in any precision.

        Args:
            real_N: where the tokens stand in the flattened rows; None if there is no padding.
        """


class Sparse(Experts):
    """Σ w_i · expert_i(x) over the K best experts of each token; see `SparseRouter`."""

    def __init__(self, model: ModelSection) -> None:
        assert isinstance(model.experts, SparseExperts)
        super().__init__(model, SparseRouter(model.experts, model.hidden_size))

    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        choice, routing = self.gate(x_NE)
        order_A = choice.experts.flatten().argsort(stable=True)
        token_A, weight_A = order_A // choice.experts.shape[1], choice.weights.flatten()[order_A]
        return dispatch(self.experts, x_NE, token_A, weight_A, routing.load), routing


class Dense(Experts):
    """Σ p_i · expert_i(x) over all experts, p the softmax of the logits (Jacobs et al. 1991)."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__(model, _router(model))

    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        logits = self.gate(x_NE)
        return _mixed(logits.softmax(-1), [expert(x_NE) for expert in self.experts]), Routing(logits)


class SoftToken(Experts):
    """One layer for each token, whose parameters are the experts' averaged by its softmax.

    What such a layer computes before its activation is the average of what the experts' projections give,
    so no parameters are made for a token; it costs what all experts cost.
    """

    def __init__(self, model: ModelSection) -> None:
        super().__init__(model, _router(model))

    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        logits = self.gate(x_NE)
        return _averaged(self.experts, logits.softmax(-1), x_NE), Routing(logits)


class SoftSequence(Experts):
    """One layer for each document, whose parameters are averaged by the softmax of its mean logits.

    SMEAR (Muqeeth et al. 2023, arXiv:2306.03745): the router reads the mean of a document's tokens. A document
    costs one expert and the averaging, so this looks ahead, and is for encoders.
    """

    def __init__(self, model: ModelSection) -> None:
        super().__init__(model, _router(model))

    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        lengths = document_lengths(ctx, real_N, x_NE.shape[0])
        means = [logits.mean(0, keepdim=True).expand_as(logits) for logits in self.gate(x_NE).split(lengths)]
        logits = torch.cat(means)
        if all(_is_plain(expert) for expert in self.experts):
            return self._merged(logits, x_NE, lengths), Routing(logits)
        # layers that a pass has wrapped have no weights to average
        return _averaged(self.experts, logits.softmax(-1), x_NE), Routing(logits)

    def _merged(self, logits_NX: Tensor, x_NE: Tensor, lengths: list[int]) -> Tensor:
        each = [dict(expert.named_parameters()) for expert in self.experts]
        stacked = {name: torch.stack([parameters[name] for parameters in each]) for name in each[0]}
        outputs = []
        for logits, x in zip(logits_NX.split(lengths), x_NE.split(lengths), strict=True):
            p_X = logits[0].softmax(-1)
            merged = {name: torch.tensordot(p_X.to(w.dtype), w, 1) for name, w in stacked.items()}
            outputs.append(functional_call(self.experts[0], merged, (x,)))
        return torch.cat(outputs)


class Slots(Experts):
    """Experts work on slots, averages of a document's tokens, and tokens read averages of the slots.

    With logits [N, X·P] of a document: slots = softmax over tokensᵀ · x, y = softmax over slots · expert(slots)
    (Soft MoE, Puigcerver et al. 2023, arXiv:2308.00951, without its normalisation of the logits). A document
    costs the same at every length. The logits that are reported are those of an expert's slots together.
    """

    def __init__(self, model: ModelSection) -> None:
        assert isinstance(model.experts, SlotExperts)
        slots = model.experts.slots_per_expert
        super().__init__(model, Router(model.experts.num_experts * slots, model.hidden_size))
        self.slots = slots

    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        lengths = document_lengths(ctx, real_N, x_NE.shape[0])
        logits = self.gate(x_NE)
        by_document = logits.split(lengths)
        # documents side by side, so that each expert is called once: [documents, X, P, E]
        slots = torch.stack(
            [
                part.softmax(0).T.to(x.dtype) @ x
                for part, x in zip(by_document, x_NE.split(lengths), strict=True)
            ]
        ).unflatten(1, (len(self.experts), self.slots))
        given = torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], 1).flatten(1, 2)
        y_NE = torch.cat(
            [part.softmax(1).to(y.dtype) @ y for part, y in zip(by_document, given, strict=True)]
        )
        return y_NE, Routing(logits.unflatten(1, (-1, self.slots)).logsumexp(-1))


class ChosenTokens(Experts):
    """Each expert takes the ⌈n · capacity_factor / X⌉ tokens of a document that score best with it.

    Scores are a token's softmax over the experts, and weigh the outputs; a token may get any number of experts
    (Zhou et al. 2022, arXiv:2202.09368). All experts get equally many, so there is nothing to balance.
    """

    def __init__(self, model: ModelSection) -> None:
        super().__init__(model, _router(model))
        assert isinstance(model.experts, ExpertChoice)
        self.capacity_factor = model.experts.capacity_factor

    def capacity(self, length: int) -> int:
        """How many tokens of a document of `length` tokens an expert takes."""
        return min(length, math.ceil(length * self.capacity_factor / len(self.experts)))

    def route(self, x_NE: Tensor, ctx: Context, real_N: Tensor | None) -> tuple[Tensor, Routing]:
        logits = self.gate(x_NE)
        tokens, weights, start = [], [], 0
        for scores in logits.softmax(-1).split(document_lengths(ctx, real_N, x_NE.shape[0])):
            best = scores.T.topk(self.capacity(scores.shape[0]), dim=-1)
            tokens.append(best.indices + start)
            weights.append(best.values)
            start += scores.shape[0]
        token_XA, weight_XA = torch.cat(tokens, 1), torch.cat(weights, 1)
        counts_X = token_XA.new_full((len(self.experts),), token_XA.shape[1])
        return dispatch(self.experts, x_NE, token_XA.flatten(), weight_XA.flatten(), counts_X), Routing(
            logits
        )


def dispatch(
    experts: Sequence[nn.Module], x_NE: Tensor, token_A: Tensor, weight_A: Tensor, counts_X: Tensor
) -> Tensor:
    """Send tokens to experts and add up what comes back, weighted: [N, E].

    Args:
        token_A: tokens in order of their experts.
        weight_A: their weights, float32.
        counts_X: how many of them each expert has.
    """
    if x_NE.is_cuda and all(is_grouped(expert) for expert in experts):
        return dispatch_grouped(experts, x_NE, token_A, weight_A, counts_X)
    return dispatch_loop(experts, x_NE, token_A, weight_A, counts_X)


def dispatch_loop(
    experts: Sequence[nn.Module], x_NE: Tensor, token_A: Tensor, weight_A: Tensor, counts_X: Tensor
) -> Tensor:
    """`dispatch`, expert by expert; those without a token are not called."""
    y_NE = x_NE.new_zeros(x_NE.shape, dtype=torch.promote_types(x_NE.dtype, torch.float32))
    counts = counts_X.tolist()
    # gathered at once: a gather for each expert has a gradient of the size of all tokens for each expert
    parts = x_NE.index_select(0, token_A).split(counts)
    tokens, weights = token_A.split(counts), weight_A.split(counts)
    for expert, x, token, weight in zip(experts, parts, tokens, weights, strict=True):
        if token.shape[0]:
            y_NE.index_add_(0, token, (expert(x) * weight[:, None]).to(y_NE.dtype))
    return y_NE


def dispatch_grouped(
    experts: Sequence[nn.Module], x_NE: Tensor, token_A: Tensor, weight_A: Tensor, counts_X: Tensor
) -> Tensor:
    """`dispatch` with one product for all experts where the loop has one for each; all must be `is_grouped`."""

    def product(x_A: Tensor, name: str) -> Tensor:
        return grouped_linear(x_A, [getattr(expert, name).weight for expert in experts], counts_X)

    x_AE = x_NE.index_select(0, token_A)
    h_AI = experts[0].activated(*(product(x_AE, name) for name in Gated.projections))
    y_AE = product(h_AI, "down_proj")
    y_NE = x_NE.new_zeros(x_NE.shape, dtype=torch.promote_types(x_NE.dtype, torch.float32))
    return y_NE.index_add(0, token_A, (y_AE * weight_A[:, None]).to(y_NE.dtype))


def is_grouped(expert: nn.Module) -> bool:
    """Whether `dispatch_grouped` can compute an expert: gated, with plain layers without biases."""
    return type(expert) is Gated and _is_plain(expert) and expert.down_proj.bias is None


def document_lengths(ctx: Context, real_N: Tensor | None, tokens: int) -> list[int]:
    """How many real tokens each document has, in the order of the flattened rows; their sum is `tokens`."""
    segment = ctx.queries.segment
    if segment is None:
        length = ctx.queries.position.shape[1]
        return [length] * (tokens // length)
    # rows name their documents each for itself
    row = torch.arange(segment.shape[0], device=segment.device)[:, None] * (segment.max() + 1)
    name = (segment + row).flatten()
    name = name if real_N is None else name[real_N]
    return torch.unique_consecutive(name, return_counts=True)[1].tolist()


def _is_plain(expert: nn.Module) -> bool:
    """Whether the layers of an expert are nothing but their weights: not wrapped, packed or watched by a hook."""
    return all(
        type(layer) is nn.Linear and not layer._forward_pre_hooks and not layer._forward_hooks
        for layer in expert.children()
    )


def _router(model: ModelSection) -> Router:
    assert model.experts is not None
    return Router(model.experts.num_experts, model.hidden_size)


def _averaged(experts: Sequence[nn.Module], p_NX: Tensor, x_NE: Tensor) -> Tensor:
    """The layer whose parameters are averaged for each token, computed from the experts' own projections."""
    projected = [expert.projected(x_NE) for expert in experts]
    h_NI = experts[0].activated(*(_mixed(p_NX, outputs) for outputs in zip(*projected, strict=True)))
    h_NI = h_NI.to(projected[0][0].dtype)
    return _mixed(p_NX, [expert.down_proj(h_NI) for expert in experts])


def _mixed(p_NX: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Σ p_i · output_i."""
    total = outputs[0] * p_NX[:, :1]
    for index, output in enumerate(outputs[1:], 1):
        total = total + output * p_NX[:, index : index + 1]
    return total


def _soft(model: ModelSection) -> Experts:
    assert model.experts is not None and model.experts.kind == "soft"
    return SOFT[model.experts.routing](model)


SOFT: dict[str, Callable[[ModelSection], Experts]] = {"token": SoftToken, "sequence": SoftSequence}
# experts.kind -> the layer: (x [B, T, E], ctx) -> (y [B, T, E], Routing)
EXPERTS: dict[str, Callable[[ModelSection], Experts]] = {
    "sparse": Sparse,
    "dense": Dense,
    "soft": _soft,
    "slots": Slots,
    "expert_choice": ChosenTokens,
}
