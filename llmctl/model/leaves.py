"""Every weight a pass may touch, with its name and shape.

LoRA, quantization, counting and sharding walk this list and nothing else, so none of them can skip
a kind of weight by accident.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

LeafKind = Literal["linear", "head"]
HEADS = frozenset({"lm_head", "score"})


@dataclass(frozen=True)
class Leaf:
    """A weight matrix in its place.

    Attributes:
        name: dotted path of the module, such as `model.layers.0.mlp.up_proj`.
        kind: `head` for the output head or the score head, `linear` for the rest.
        shape: (out, in).
    """

    name: str
    module: nn.Module
    kind: LeafKind
    shape: tuple[int, int]


def leaves(model: nn.Module) -> Iterator[Leaf]:
    """All leaves of a model in order of construction. The embedding table is not a matrix product."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # any part of the name: a pass may have put a module of its own around the head
            kind: LeafKind = "head" if not set(HEADS).isdisjoint(name.split(".")) else "linear"
            yield Leaf(name, module, kind, (module.out_features, module.in_features))


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one with this dotted name."""
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, module)
