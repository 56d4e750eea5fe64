"""How far apart two models are, held against how far rounding alone moves the first of them.

Two models that differ by rounding disagree wherever two tokens are nearly equally likely: SmolLM2-135M in
bfloat16 prefers another next token than in float32 at 2.6 % of all places. So agreement is also counted at
`decided` places only: those where the first model's lead of its likeliest token over the second one is larger
than rounding ever (at 99.9 % of all places) moved such a lead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.kernels.cross_entropy import IGNORE
from llmctl.kernels.device import Compute
from llmctl.kernels.threads import timed_batches
from llmctl.model import LlmctlForCausalLM
from llmctl.talk import SILENT, Talk

SLICE = 256  # tokens whose logits exist at once, for every model
LARGEST = 0.999  # quantile of the moves of a lead by rounding, above which a lead is decided


@dataclass(frozen=True)
class Noise:
    """What rounding to another precision does to the first model. All tensors [N], one entry a token.

    Attributes:
        kl: KL(a, a rounded), in nats.
        agreed: whether both prefer the same token.
        lead: by how many nats a's likeliest token leads the second one.
        shift: how far rounding moved that lead, in nats.
    """

    kl: Tensor
    agreed: Tensor
    lead: Tensor
    shift: Tensor

    @property
    def level(self) -> float:
        """The lead, in nats, that rounding does not overturn."""
        return float(self.shift.quantile(LARGEST)) if len(self.shift) else 0.0


@dataclass(frozen=True)
class Parity:
    """Two models at the labelled tokens of some rows. All tensors [N], one entry a token.

    Attributes:
        kl: KL(a, b), in nats.
        agreed: whether both prefer the same token.
        nats_a, nats_b: negative log-likelihood of the token under each.
        row: the number of the row it stands in.
        noise: None where nothing was rounded.
    """

    kl: Tensor
    agreed: Tensor
    nats_a: Tensor
    nats_b: Tensor
    row: Tensor
    noise: Noise | None = None

    def figures(self) -> dict[str, float]:
        """Means over the tokens; a model whose odds are not numbers has kl NaN.

        top1 (share that agrees), kl and max_kl (nats per token), kl_error (standard error of kl, of whole rows),
        perplexity of both, tokens. With noise: noise_kl, noise_top1, noise_lead (the lead that counts as
        decided), decided (share of such tokens) and decided_top1 (share of these that agrees; 1 where there are none).
        """
        kl = _mean(self.kl)
        found: dict[str, float] = {
            "top1": _mean(self.agreed.double()),
            # rounding may leave a sum of zeros just below zero
            "kl": kl if math.isnan(kl) else max(0.0, kl),
            "kl_error": self._error(kl),
            "max_kl": float(self.kl.max()) if len(self.kl) else 0.0,
            "perplexity_a": _exp(_mean(self.nats_a)),
            "perplexity_b": _exp(_mean(self.nats_b)),
            "tokens": len(self.kl),
        }
        if self.noise is None:
            return found
        level = self.noise.level
        decided = self.noise.lead > level
        return found | {
            "noise_kl": max(0.0, _mean(self.noise.kl)),
            "noise_top1": _mean(self.noise.agreed.double()),
            "noise_lead": level,
            "decided": _mean(decided.double()),
            "decided_top1": _mean(self.agreed[decided].double()) if bool(decided.any()) else 1.0,
        }

    def _error(self, mean: float) -> float:
        """Tokens of a row are alike, so what varies is taken row by row (a ratio estimator of clusters)."""
        rows, place = self.row.unique(return_inverse=True)
        if len(rows) < 2:
            return math.nan
        off = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, place, self.kl - mean)
        return float((off.square().sum() * len(rows) / (len(rows) - 1)).sqrt() / len(self.kl))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)  # NaN stays NaN


@torch.no_grad()
def parity(
    a: LlmctlForCausalLM,
    b: LlmctlForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    compute: Compute,
    *,
    rounded: torch.dtype | None = None,
    max_tokens: int | None = None,
    labels: int | None = None,
    talk: Talk = SILENT,
) -> Parity:
    """Compare two models on batches of input_ids, labels and position_ids, [B, T] each.

    Where one has more rows of vocabulary than the other, only those both have are looked at.

    Args:
        rounded: the precision in which `a` also runs, as the noise that the two are held against.
        max_tokens: after the row that reaches it, the rest is left out.
        labels: how many labelled tokens the batches have, for the bar.
    """
    passes = [(a, compute.autocast()), (b, compute.autocast())]
    if rounded is not None:
        passes.append((a, Compute(compute.device, rounded).autocast()))
    parts: list[list[Tensor]] = []
    rows = tokens = 0
    total = min((count for count in (max_tokens, labels) if count is not None), default=None)
    with talk.bar("comparing", total, "tokens") as bar:
        for batch in timed_batches(batches, a, b):
            if max_tokens is not None:
                batch = _first_rows(batch, max_tokens - tokens)
            moved = {name: value.to(compute.device) for name, value in batch.items()}
            labels = moved["labels"][:, 1:]
            row, _ = (labels != IGNORE).nonzero(as_tuple=True)
            found = _figures(passes, moved, labels.flatten())
            parts.append([*found, (row + rows).cpu()])
            rows, tokens = rows + len(labels), tokens + len(row)
            bar.advance(len(row))
            if max_tokens is not None and tokens >= max_tokens:
                break
    empty = [torch.zeros(0, dtype=torch.float64) for _ in range(9)]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] or empty
    kl, agreed, nats_a, nats_b, *noise, row = columns
    return Parity(kl, agreed.bool(), nats_a, nats_b, row, Noise(*noise) if rounded is not None else None)


def _first_rows(batch: Mapping[str, Tensor], tokens: int) -> Mapping[str, Tensor]:
    """The rows of a batch up to the one with which it has that many labelled tokens."""
    before = (batch["labels"][:, 1:] != IGNORE).sum(1).cumsum(0)
    rows = int((before < tokens).sum()) + 1
    return {name: value[:rows] for name, value in batch.items()}


Pass = tuple[LlmctlForCausalLM, AbstractContextManager[object]]


def _figures(passes: list[Pass], batch: Mapping[str, Tensor], labels: Tensor) -> list[Tensor]:
    """The columns of `Parity`, without rows, and of `Noise`, for the labelled tokens of a batch."""
    kept = (labels != IGNORE).nonzero().squeeze(1)
    labels = labels[kept]
    hidden = []
    for model, precision in passes:
        with precision:
            hidden.append(_hidden(model, batch)[kept])
    parts = []
    for at in range(0, len(kept), SLICE):
        part = slice(at, at + SLICE)
        log_a, *others = _log_probabilities(passes, [h[part] for h in hidden])
        log_b = others[0]
        found = [_kl(log_a, log_b), log_a.argmax(-1) == log_b.argmax(-1)]
        found += [-log.gather(1, labels[part, None]).squeeze(1) for log in (log_a, log_b)]
        if len(others) > 1:
            top = log_a.topk(2)
            lead = top.values[:, 0] - top.values[:, 1]
            after = others[1].gather(1, top.indices)
            found += [
                _kl(log_a, others[1]),
                log_a.argmax(-1) == others[1].argmax(-1),
                lead,
                (after[:, 0] - after[:, 1] - lead).abs(),
            ]
        parts.append([column.double().cpu() for column in found])
    if not parts:
        return [torch.zeros(0, dtype=torch.float64)] * (8 if len(passes) > 2 else 4)
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _hidden(model: LlmctlForCausalLM, batch: Mapping[str, Tensor]) -> Tensor:
    out = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    return out[:, :-1].flatten(0, 1)


def _log_probabilities(passes: list[Pass], hidden: list[Tensor]) -> list[Tensor]:
    logits = []
    for (model, precision), states in zip(passes, hidden, strict=True):
        with precision:
            logits.append(model.head(states).float())
    shared = min(each.shape[-1] for each in logits)
    return [F.log_softmax(each[:, :shared], dim=-1) for each in logits]
