"""How far apart two models are: do they prefer the same next tokens, and how much do their odds differ?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.kernels.cross_entropy import IGNORE
from llmctl.kernels.device import Compute
from llmctl.kernels.threads import timed_batches
from llmctl.model import LlmctlForCausalLM

SLICE = 512  # tokens whose logits exist at once, for both models


@dataclass(frozen=True)
class Parity:
    """Sums over the labelled tokens of some rows; every figure follows from them.

    Attributes:
        tokens: places at which a token was predicted.
        agreed: of them, those at which both models prefer the same token.
        kl: sum of KL(a, b), in nats.
        worst: the largest of them.
        nats_a, nats_b: negative log-likelihood of the rows under each.
    """

    tokens: int
    agreed: int
    kl: float
    worst: float
    nats_a: float
    nats_b: float

    def figures(self) -> dict[str, float]:
        """top1 (share that agrees), kl and max_kl (nats per token), perplexity of both, tokens.

        A model whose odds are not numbers has kl NaN.
        """
        count = max(1, self.tokens)
        return {
            "top1": self.agreed / count,
            # rounding may leave a sum of zeros just below zero
            "kl": self.kl / count if math.isnan(self.kl) else max(0.0, self.kl / count),
            "max_kl": self.worst,
            "perplexity_a": _exp(self.nats_a / count),
            "perplexity_b": _exp(self.nats_b / count),
            "tokens": self.tokens,
        }


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)  # NaN stays NaN


@torch.no_grad()
def parity(
    a: LlmctlForCausalLM, b: LlmctlForCausalLM, batches: Iterable[Mapping[str, Tensor]], compute: Compute
) -> Parity:
    """Compare two models on batches of input_ids, labels and position_ids, [B, T] each.

    Where one has more rows of vocabulary than the other, only those both have are looked at.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # agreed, kl, nats of a and of b
    tokens, worst = 0, torch.zeros(())
    for batch in timed_batches(batches, a, b):
        moved = {name: value.to(compute.device) for name, value in batch.items()}
        labels = moved["labels"][:, 1:].flatten()
        kept = (labels != IGNORE).nonzero().squeeze(1)
        labels = labels[kept]
        with compute.autocast():
            hidden = [_hidden(model, moved)[kept] for model in (a, b)]
            for at in range(0, len(kept), SLICE):
                part = slice(at, at + SLICE)
                log_a, log_b = _log_probabilities((a, b), [h[part] for h in hidden])
                kl = (log_a.exp() * (log_a - log_b)).sum(-1)
                # a comparison with NaN is False, so max() would pass over it
                worst = torch.where(kl.isnan().any(), torch.nan, torch.maximum(worst, kl.max().cpu()))
                found = [-log.gather(1, labels[part, None]).sum() for log in (log_a, log_b)]
                agreed = (log_a.argmax(-1) == log_b.argmax(-1)).sum()
                sums += torch.stack([agreed.double(), kl.double().sum(), *map(Tensor.double, found)]).cpu()
        tokens += len(kept)
    agreed_sum, kl_sum, nats_a, nats_b = sums.tolist()
    return Parity(tokens, round(agreed_sum), kl_sum, float(worst), nats_a, nats_b)


def _hidden(model: LlmctlForCausalLM, batch: Mapping[str, Tensor]) -> Tensor:
    out = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    return out[:, :-1].flatten(0, 1)


def _log_probabilities(models: tuple[LlmctlForCausalLM, ...], hidden: list[Tensor]) -> list[Tensor]:
    logits = [model.head(h).float() for model, h in zip(models, hidden, strict=True)]
    shared = min(each.shape[-1] for each in logits)
    return [F.log_softmax(each[:, :shared], dim=-1) for each in logits]
