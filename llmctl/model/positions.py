"""How positions enter the model: added to the embeddings, by turning queries and keys, or on the scores.

Shape legend: B rows, T tokens, S keys, E hidden width, D head width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmctl.model.context import Context, Tokens
from llmctl.model.rope import rotary_tables
from llmctl.recipe.model import ModelSection


class Positions(nn.Module):
    """What a kind of position does in its three places; a kind overrides the one it acts in."""

    def embed(self, x_BTE: Tensor, position_BT: Tensor) -> Tensor:
        """The embedded tokens with their positions."""
        return x_BTE

    def rotary(self, position_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [B or 1, 1, T, D/2] by which queries and keys are turned."""
        return None

    def bias(self, ctx: Context) -> Tensor | None:
        """What is added to the scores, [B or 1, H, T, S] in float32."""
        return None


class NoPosition(Positions):
    """None: for layers that know the order by themselves, and causal attention without (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()


class Rotary(Positions):
    """Pairs of channels of queries and keys are turned by angles that grow with the position."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.model = model

    def rotary(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(self.model, position_BT)


class Learned(Positions):
    """A table with a row for each position (Gehring et al. 2017, arXiv:1705.03122); it ends where the table ends."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.offset = model.position_offset
        self.weight = nn.Parameter(
            torch.empty(model.max_position_embeddings + self.offset, model.hidden_size)
        )

    def embed(self, x_BTE: Tensor, position_BT: Tensor) -> Tensor:
        return x_BTE + nn.functional.embedding(position_BT + self.offset, self.weight)


class Sinusoidal(Positions):
    """sin and cos of position / 10000^(2i/E), side by side (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.width = model.hidden_size

    def embed(self, x_BTE: Tensor, position_BT: Tensor) -> Tensor:
        even = torch.arange(0, self.width, 2, dtype=torch.float32, device=x_BTE.device)
        angles = position_BT[..., None].float() * 10000.0 ** -(even / self.width)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.width]
        return x_BTE + table.to(x_BTE.dtype)


class Alibi(Positions):
    """Scores fall with the distance, at a rate of each head (Press et al. 2022, arXiv:2108.12409)."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.slopes = alibi_slopes(model.num_attention_heads)

    def bias(self, ctx: Context) -> Tensor:
        slopes = torch.tensor(self.slopes, device=ctx.queries.position.device)
        return -slopes[None, :, None, None] * _distance(ctx.queries, ctx.keys).abs()[:, None].float()


class Relative(Positions):
    """A learned score for each head and distance; far distances share one, as in T5 (Raffel et al. 2020, arXiv:1910.10683)."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.buckets = model.relative_attention_num_buckets
        self.farthest = model.relative_attention_max_distance
        self.weight = nn.Parameter(torch.empty(self.buckets, model.num_attention_heads))

    def bias(self, ctx: Context) -> Tensor:
        both_ways = ctx.causality == "none"
        bucket = relative_buckets(-_distance(ctx.queries, ctx.keys), both_ways, self.buckets, self.farthest)
        return nn.functional.embedding(bucket, self.weight).permute(0, 3, 1, 2).float()


def _distance(queries: Tokens, keys: Tokens) -> Tensor:
    """Query position - key position, [B or 1, T, S]."""
    return queries.position[:, :, None] - keys.position[:, None]


def alibi_slopes(heads: int) -> list[float]:
    """A geometric series for a power of two heads; for others, every second one of the next series fills up."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * whole, 2)]
    return slopes + between[: heads - whole]


def relative_buckets(ahead: Tensor, both_ways: bool, buckets: int, farthest: int) -> Tensor:
    """T5's buckets of `ahead` = key position - query position: small distances alone, larger ones in a log scale."""
    found = torch.zeros_like(ahead)
    if both_ways:
        buckets //= 2
        found = (ahead > 0).long() * buckets
        distance = ahead.abs()
    else:
        distance = (-ahead).clamp(min=0)
    alone = buckets // 2
    scaled = (distance.float().clamp(min=1) / alone).log() / math.log(farthest / alone) * (buckets - alone)
    far = (alone + scaled.long()).clamp(max=buckets - 1)
    return found + torch.where(distance < alone, distance, far)


POSITIONS: dict[str, Callable[[ModelSection], Positions]] = {
    "rope": Rotary,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "relative": Relative,
    "alibi": Alibi,
    "none": NoPosition,
}
