"""How the working parts speak while they work, without knowing about terminals.

`cli/` hands in a `Talk` that draws on stderr; everything else, tests included, may use `SILENT`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

Batch = TypeVar("Batch", bound=Mapping[str, Any])


class Bar(Protocol):
    """A running count of work done."""

    def advance(self, amount: float = 1, **facts: str) -> None:
        """Count `amount` more units done; `facts` are shown beside the bar, such as loss="3.21"."""

    def resume(self, done: float, seconds: float) -> None:
        """Begin with what an earlier process did: `done` units in `seconds`. Called before the first `advance`."""


class Talk(Protocol):
    """Where a stage says what it does."""

    def say(self, text: str) -> None:
        """One line the user should see once."""

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        """Progress over `total` units (None: unknown), named in the plural: "steps", "MB", "documents".

        Work that cannot be counted has neither: `bar("folding", None, "")` shows how long it has lasted.
        """


def rows_told(batches: Iterable[Batch], rows: int, label: str, talk: Talk) -> Iterator[Batch]:
    """The batches, each [B, …] by name, with a bar over their rows."""
    with talk.bar(label, rows, "rows") as bar:
        for batch in batches:
            yield batch
            bar.advance(len(batch["input_ids"]))


class _SilentBar:
    def advance(self, amount: float = 1, **facts: str) -> None:
        return

    def resume(self, done: float, seconds: float) -> None:
        return


class _Silent:
    def say(self, text: str) -> None:
        return

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        return nullcontext(_SilentBar())


SILENT: Talk = _Silent()
