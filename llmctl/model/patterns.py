"""Attention patterns: which positions a query may look at, besides causality and documents.

A pattern is a predicate over positions, never over storage places, so the same lines give the dense
mask, the blocks of a local path, and the row of one decoding step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.recipe.model import ModelSection


class Pattern(ABC):
    """Hashable, so that layers with the same pattern share one mask. A kind overrides what it is not like the others in."""

    @abstractmethod
    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """True where the query's position may see the key's; arguments broadcast to [B, T, S]."""

    def sees_all(self, length: int) -> bool:
        """Whether the pattern hides nothing among positions 0 … length - 1 of one document."""
        return self.reach is not None and length <= self.reach + 1

    @property
    def reach(self) -> int | None:
        """Largest distance at which a query sees a key, anchors and drawn blocks aside; None if there is none."""
        return None

    @property
    def anchors(self) -> int:
        """How many first positions are seen by all and see all, whatever the distance."""
        return 0

    @property
    def draws(self) -> Random | None:
        """The blocks it draws by chance, if it draws any."""
        return None


@dataclass(frozen=True)
class Full(Pattern):
    """Every position (Vaswani et al. 2017, arXiv:1706.03762)."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query == key)

    def sees_all(self, length: int) -> bool:
        return True


@dataclass(frozen=True)
class Band(Pattern):
    """Less than `window` positions to either side (Longformer, Beltagy et al. 2020, arXiv:2004.05150)."""

    window: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() < self.window

    @property
    def reach(self) -> int:
        return self.window - 1


@dataclass(frozen=True)
class Sliding(Band):
    """The last `window` positions, the query's own included (Mistral 7B, arXiv:2310.06825)."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return query - key < self.window


@dataclass(frozen=True)
class Dilated(Pattern):
    """Every `step`-th position, less than `window` steps to either side (Longformer, arXiv:2004.05150)."""

    window: int
    step: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        apart = (query - key).abs()
        return (apart % self.step == 0) & (apart < self.window * self.step)

    def sees_all(self, length: int) -> bool:
        return length <= 1

    @property
    def reach(self) -> int:
        return (self.window - 1) * self.step


@dataclass(frozen=True)
class Global(Pattern):
    """The first `count` positions, which are seen by all and see all (Star-Transformer, arXiv:1902.09113; ETC, arXiv:2004.08483)."""

    count: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        # a token sees itself, or one of a document's middle would see nothing of its own
        return (query < self.count) | (key < self.count) | (query == key)

    def sees_all(self, length: int) -> bool:
        return length <= self.count

    @property
    def reach(self) -> int:
        return 0

    @property
    def anchors(self) -> int:
        return self.count


@dataclass(frozen=True)
class Block(Pattern):
    """The query's own block of `size` positions (Qiu et al. 2020, arXiv:1911.02972)."""

    size: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return query // self.size == key // self.size

    @property
    def reach(self) -> int:
        return self.size - 1


@dataclass(frozen=True)
class Random(Pattern):
    """`count` blocks of `size` positions, drawn for each block among those before it (BigBird, arXiv:2007.14062).

    What is drawn depends on the layer and the blocks alone, so it is the same for every length. A pair that is
    drawn sees each other, which makes the pattern one for encoders too.
    """

    count: int
    size: int
    layer: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        later, earlier = torch.maximum(query, key) // self.size, torch.minimum(query, key) // self.size
        found = later == earlier
        for draw in range(self.count):
            found = found | (self.drawn(later, draw) == earlier)
        return found

    def drawn(self, block: Tensor, draw: int) -> Tensor:
        """The number of the block that draw `draw` gives to a block; no larger than its own."""
        return hashed(block * 64 + draw, self.layer) % (block + 1)

    def earlier_blocks(self, blocks: int) -> Tensor:
        """The blocks that each of `blocks` blocks has drawn, [blocks, count]."""
        here = torch.arange(blocks)
        return torch.stack([self.drawn(here, draw) for draw in range(self.count)], dim=1)

    @property
    def reach(self) -> int:
        return self.size - 1

    @property
    def draws(self) -> Random:
        return self


@dataclass(frozen=True)
class Union(Pattern):
    """What any of several patterns sees, as in Longformer, BigBird and ETC."""

    parts: tuple[Pattern, ...]

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        found = self.parts[0].sees(query, key)
        for part in self.parts[1:]:
            found = found | part.sees(query, key)
        return found

    def sees_all(self, length: int) -> bool:
        return any(part.sees_all(length) for part in self.parts)

    @property
    def reach(self) -> int | None:
        far = [part.reach for part in self.parts]
        return None if None in far else max(reach for reach in far if reach is not None)

    @property
    def anchors(self) -> int:
        return max(part.anchors for part in self.parts)

    @property
    def draws(self) -> Random | None:
        return next((part.draws for part in self.parts if part.draws is not None), None)


def hashed(value: Tensor, seed: int) -> Tensor:
    """A well-mixed number of 31 bits for each (Wellons 2018, "lowbias32"), in 64-bit arithmetic."""
    x = (value.long() + 0x9E3779B9 * (seed + 1)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >> 1


def _window(model: ModelSection) -> int:
    assert model.sliding_window is not None  # the recipe check has seen to it and the other sizes
    return model.sliding_window


# (model, layer) -> the pattern
PATTERNS: dict[str, Callable[[ModelSection, int], Pattern]] = {
    "full": lambda model, layer: Full(),
    "sliding": lambda model, layer: Sliding(_window(model)),
    "band": lambda model, layer: Band(_window(model)),
    "dilated": lambda model, layer: Dilated(_window(model), model.dilation or 1),
    "global": lambda model, layer: Global(model.num_global_tokens or 0),
    "random": lambda model, layer: Random(model.num_random_blocks or 0, model.block_size or 1, layer),
    "block": lambda model, layer: Block(model.block_size or 1),
}


def pattern_of(model: ModelSection, layer: int) -> Pattern:
    """The pattern of a layer whose kind is one of `PATTERNS`, or several joined by `+`."""
    parts = tuple(PATTERNS[part](model, layer) for part in model.layer_pattern(layer).split("+"))
    return parts[0] if len(parts) == 1 else Union(parts)
