"""How a family's tensors on disk become the core's, and back: rename, transpose, split, stack, reorder.

A rule is written once, in the direction disk -> core; its inverse follows. Names may hold `{i}`
(the layer) and other braces, which match digits. Rules are tried on their first name.

`split_rows` and `join_rows` do the same with what has a row for each output of a matrix, such as the second factor
of a low-rank update, [out, r]: there a row is an output even where the matrix itself is stored (in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class _One:
    """A rule from one tensor to one."""

    disk: str
    core: str

    @property
    def disk_names(self) -> tuple[str, ...]:
        return (self.disk,)

    @property
    def core_names(self) -> tuple[str, ...]:
        return (self.core,)

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        return [rows]

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        return parts[0]


@dataclass(frozen=True)
class Rename(_One):
    """One tensor, another name; `transpose` for layers that store (in, out), such as GPT-2's Conv1D."""

    transpose: bool = False

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].T.contiguous() if self.transpose else parts[0]]

    save = load

    @property
    def copies(self) -> bool:
        return self.transpose


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

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        return list(torch.split(rows, list(self.sizes) or rows.shape[0] // len(self.core)))

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    @property
    def copies(self) -> bool:
        return self.transpose or self.dim != 0

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

    copies = True

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack(parts)]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [part.contiguous() for part in parts[0].unbind(0)]

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        raise ValueError("numbered matrices are no rows of a stacked one")

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        raise ValueError("numbered matrices are no rows of a stacked one")

    @property
    def disk_names(self) -> tuple[str, ...]:
        return tuple(self.disk.replace("{e}", str(index)) for index in range(self.count))

    @property
    def core_names(self) -> tuple[str, ...]:
        return (self.core,)


@dataclass(frozen=True)
class Unpair(_One):
    """Rows that are turned by position, side by side on disk and half a head apart in the core.

    The tensor is made of heads of `head` rows. The last `rotary` rows of each are (x0, y0, x1, y1 …) on disk and
    (x0, x1 …, y0, y1 …) in the core; a pair (x, y) is turned by one angle.
    """

    head: int
    rotary: int

    copies = True

    def load(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].index_select(0, self._order(parts[0]))]

    def save(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0].index_select(0, self._order(parts[0]).argsort())]

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        return self.load([rows])

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        return self.save(parts)[0]

    def _order(self, rows: Tensor) -> Tensor:
        """Which row on disk each row of the core is."""
        plain, half = self.head - self.rotary, self.rotary // 2
        turned = plain + torch.arange(self.rotary).view(half, 2).T.flatten()
        head = torch.cat((torch.arange(plain), turned))
        starts = torch.arange(0, rows.shape[0], self.head)[:, None]
        return (starts + head).flatten().to(rows.device)


# `copies`: whether what is loaded is new memory, and not a view of what is on disk
Rule = Rename | Split | Stack | Unpair


@dataclass(frozen=True)
class Step:
    """One rule applied: the tensors `disk` of the file are the tensors `core`."""

    rule: Rule
    disk: tuple[str, ...]
    core: tuple[str, ...]

    def load(self, parts: list[Tensor]) -> dict[str, Tensor]:
        """The core's tensors, of those on disk."""
        return dict(zip(self.core, self.rule.load(parts), strict=True))

    def save(self, parts: list[Tensor]) -> dict[str, Tensor]:
        """The tensors on disk, of the core's."""
        return dict(zip(self.disk, self.rule.save(parts), strict=True))

    def split_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows by the names of the core's tensors that they belong to."""
        return dict(zip(self.core, self.rule.split_rows(rows), strict=True))


def to_core(names: Iterable[str], rules: tuple[Rule, ...]) -> list[Step]:
    """How tensors with these names on disk become the core's. Names that no rule mentions stay."""
    return _steps(list(names), rules, from_disk=True)


def from_core(names: Iterable[str], rules: tuple[Rule, ...]) -> list[Step]:
    """The steps that hold the core's tensors with these names. Names that no rule mentions stay."""
    return _steps(list(names), rules, from_disk=False)


def to_disk(state: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """The core's tensors under the names and shapes of the family's files."""
    found: dict[str, Tensor] = {}
    for step in from_core(state, rules):
        found |= step.save([state[name] for name in step.core])
    return found


def _steps(names: list[str], rules: tuple[Rule, ...], from_disk: bool) -> list[Step]:
    steps: list[Step] = []
    taken: set[str] = set()
    for rule in rules:
        first = (rule.disk_names if from_disk else rule.core_names)[0]
        for name in names:
            found = _pattern(first).fullmatch(name)
            if found is None:
                continue
            disk, core = (
                tuple(_fill(each, found.groupdict()) for each in sides)
                for sides in (rule.disk_names, rule.core_names)
            )
            steps.append(Step(rule, disk, core))
            taken.update(disk if from_disk else core)
    return steps + [Step(Rename(name, name), (name,), (name,)) for name in names if name not in taken]


@cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile("".join(re.escape(p) if i % 2 == 0 else rf"(?P<{p}>\d+)" for i, p in enumerate(parts)))


def _fill(pattern: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        pattern = pattern.replace("{" + key + "}", value)
    return pattern
