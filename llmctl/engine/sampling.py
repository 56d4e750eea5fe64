"""From logits to a token: small functions on one row of logits [V], composed by `sampler`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Filter = Callable[[Tensor], Tensor]


def temperature(logits: Tensor, value: float) -> Tensor:
    """Logits divided by `value` > 0: below 1 sharper, above 1 flatter."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits set to -inf (Fan et al. 2018, arXiv:1805.04833). Ties at the border stay."""
    if k >= logits.shape[-1]:
        return logits
    border = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < border, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).

    The likeliest token always stays.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before < p)
    return logits.masked_fill(~kept, -torch.inf)


def likeliest(logits: Tensor) -> Tensor:
    """Greedy decoding: logits [B, V] -> token ids [B]."""
    return logits.float().argmax(-1)  # torch has no fast one for bfloat16 on the CPU


def sampler(heat: float, k: int | None, p: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Logits [B, V] -> token ids [B]. A `heat` of 0 is greedy and ignores the rest.

    Draws on the CPU from a generator of its own, so a seed gives the same text on every device.
    """
    if heat == 0:
        return likeliest
    filters: list[Filter] = [lambda logits: temperature(logits, heat)]
    if k is not None:
        filters.append(lambda logits: top_k(logits, k))
    if p < 1:
        filters.append(lambda logits: top_p(logits, p))
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        logits = logits.float().cpu()
        for function in filters:
            logits = function(logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

    return draw
