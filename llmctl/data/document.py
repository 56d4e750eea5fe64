"""What the readers hand over: documents, and an account of every document or record that was read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmctl.errors import UserError
from llmctl.recipe.ranges import MAX_DOCUMENT_MB

EXAMPLES = 5
MEGABYTE = 1_000_000  # bytes


@dataclass(frozen=True)
class Limit:
    """The size of one document or record: it is held in memory whole, so there must be one.

    Text files have none where they are read in parts.

    Args:
        megabytes: of 10^6 bytes, after decompression.
        field: the recipe field that sets it, for the hint.
    """

    megabytes: float = MAX_DOCUMENT_MB
    field: str = "data.max_document_mb"

    @property
    def bytes(self) -> int:
        """The same in bytes."""
        return int(self.megabytes * MEGABYTE)

    def exceeded(self, place: str, what: str, size: int | None = None) -> UserError:
        """The error that `what` at `place` is larger; `size` in bytes if it is known."""
        known = "" if size is None else f" ({size / MEGABYTE:,.0f} MB)"
        return UserError(
            f"{place}: {what} is larger than {self.megabytes:,g} MB{known}",
            f"cut it into smaller documents, or raise {self.field}; memory grows by up to 6 times that",
        )


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    A very long text arrives in parts, in order: `starts` is False on all but the first part, `ends`
    on all but the last. The parts joined are the text, character for character.

    Args:
        source: the file or `builtin:NAME`, as `resolve` lists it.
        line: line of a jsonl file, row of a parquet file, ordinal in a builtin, all from 1; None for
            a whole file.
    """

    text: str
    source: str
    line: int | None
    starts: bool = True
    ends: bool = True

    @property
    def place(self) -> str:
        """Where it was read: "data.jsonl:3", or the file where it is a whole one."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Account:
    """Every document (or record) read is kept or dropped for a reason: read == kept + sum of counts.

    Args:
        dropped: reason -> the first few places, as "path:line".
        counts: reason -> how many.
        input_bytes: bytes taken from the files so far (compressed ones as they lie on the disk).
        noun: what is counted, in the singular: "document", "record".
        notes: what else should be said of the data, a sentence each.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    input_bytes: int = 0
    noun: str = "document"
    notes: list[str] = field(default_factory=list)

    def keep(self) -> None:
        """Count one read and kept."""
        self.read += 1
        self.kept += 1

    def drop(self, reason: str, place: str) -> None:
        """Count one read and dropped."""
        self.read += 1
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.dropped.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(place)

    def reject(self, reason: str, place: str) -> None:
        """Count one that was kept as dropped after all."""
        self.read -= 1
        self.kept -= 1
        self.drop(reason, place)

    def note(self, sentence: str) -> None:
        """Say something of the data, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def lines(self) -> list[str]:
        """What happened, a sentence a line; the first line is always the totals, the notes come last."""
        said = [f"read {_count(self.read, self.noun)}, kept {self.kept:,}"]
        for reason, count in sorted(self.counts.items()):
            more = ", …" if count > len(self.dropped[reason]) else ""
            said.append(f"dropped {count:,}: {reason} ({', '.join(self.dropped[reason])}{more})")
        return said + self.notes

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a manifest; `Account(**values)` makes it again."""
        return asdict(self)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
