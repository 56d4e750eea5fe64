"""How a family's tensors on disk become the core's, and back: rename, transpose, split, stack.

A rule is written once, in the direction disk -> core; its inverse follows. Names may hold `{i}`
(the layer) and other braces, which match digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Rename:
    """One tensor, another name; `transpose` for layers that store (in, out), such as GPT-2's Conv1D."""

    disk: str
    core: str
    transpose: bool = False

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].T.contiguous() if self.transpose else parts[0]]

    save = load

    @property
    def disk_names(self) -> tuple[str, ...]:
        return (self.disk,)

    @property
    def core_names(self) -> tuple[str, ...]:
        return (self.core,)


@dataclass(frozen=True)
class Split:
    """One tensor on disk, several in the core: cut along `dim` into `sizes` (equal parts if empty).

    `transpose` applies to the parts, after the cut.
    """

    disk: str
    core: tuple[str, ...]
    dim: int = 0
    sizes: tuple[int, ...] = ()
    transpose: bool = False

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        whole = parts[0]
        cut = list(self.sizes) or whole.shape[self.dim] // len(self.core)
        pieces = torch.split(whole, cut, dim=self.dim)
        return [(piece.T if self.transpose else piece).contiguous() for piece in pieces]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([part.T if self.transpose else part for part in parts], dim=self.dim).contiguous()]

    @property
    def disk_names(self) -> tuple[str, ...]:
        return (self.disk,)

    @property
    def core_names(self) -> tuple[str, ...]:
        return self.core


@dataclass(frozen=True)
class Stack:
    """Numbered tensors on disk (`{e}`), one stacked tensor [count, …] in the core: experts."""

    disk: str
    core: str
    count: int

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack(parts)]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [part.contiguous() for part in parts[0].unbind(0)]

    @property
    def disk_names(self) -> tuple[str, ...]:
        return tuple(self.disk.replace("{e}", str(index)) for index in range(self.count))

    @property
    def core_names(self) -> tuple[str, ...]:
        return (self.core,)


Rule = Rename | Split | Stack


def to_core(names: list[str], rules: tuple[Rule, ...]) -> dict[str, tuple[Rule, tuple[str, ...], int]]:
    """Where each core tensor comes from: core name -> (rule, disk names, which of the rule's results).

    Disk names that no rule mentions keep their name.
    """
    return _plan(names, rules, disk_to_core=True)


def to_disk(state: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """The core's tensors under the names and shapes of the family's files."""
    plan = _plan(list(state), rules, disk_to_core=False)
    return {
        name: _apply(rule, sources, index, state.__getitem__, True)
        for name, (rule, sources, index) in plan.items()
    }


def load_one(source: tuple[Rule, tuple[str, ...], int], get: Get) -> Tensor:
    """One core tensor, read through `get(disk name)`."""
    rule, names, index = source
    return _apply(rule, names, index, get, False)


def _apply(rule: Rule, names: tuple[str, ...], index: int, get: Get, saving: bool) -> Tensor:
    parts = [get(name) for name in names]
    return (rule.save(parts) if saving else rule.load(parts))[index]


def _plan(
    names: list[str], rules: tuple[Rule, ...], disk_to_core: bool
) -> dict[str, tuple[Rule, tuple[str, ...], int]]:
    plan: dict[str, tuple[Rule, tuple[str, ...], int]] = {}
    taken: set[str] = set()
    for rule in rules:
        inputs, outputs = rule.disk_names, rule.core_names
        if not disk_to_core:
            inputs, outputs = outputs, inputs
        for name in names:
            found = _match(inputs[0], name)
            if found is None:
                continue
            sources = tuple(_fill(pattern, found) for pattern in inputs)
            taken.update(sources)
            for index, pattern in enumerate(outputs):
                plan[_fill(pattern, found)] = (rule, sources, index)
    for name in names:
        if name not in taken:
            plan[name] = (Rename(name, name), (name,), 0)
    return plan


def _match(pattern: str, name: str) -> dict[str, str] | None:
    parts = re.split(r"\{(\w+)\}", pattern)
    regex = "".join(re.escape(p) if i % 2 == 0 else rf"(?P<{p}>\d+)" for i, p in enumerate(parts))
    found = re.fullmatch(regex, name)
    return None if found is None else found.groupdict()


def _fill(pattern: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        pattern = pattern.replace("{" + key + "}", value)
    return pattern
