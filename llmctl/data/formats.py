"""From records to checked examples: the keys of a record say what it is.

The first record of a file decides the format of the file. A record that does not fit stops the
reading, with the place and the nearest format; a record in which there is nothing to train on is
dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.data import convert
from llmctl.data.document import Account, Limit
from llmctl.data.readers import SURROGATE
from llmctl.data.records import DEFAULT_LIMIT, Record, holds_text, listed, place, records_in, shown
from llmctl.data.shapes import Completion, Conversation, Labelled, Preference, Shape, Text
from llmctl.data.sources import resolve
from llmctl.data.turns import Bad, Message, Unusable
from llmctl.errors import UserError, nearest, one_of

__all__ = [
    "Account",
    "Completion",
    "Conversation",
    "Example",
    "Labelled",
    "Message",
    "Preference",
    "Shape",
    "Text",
    "examples",
]

MOST_KEYS = 1000  # keys, and sets of keys, that are remembered: data may have new ones in every record


@dataclass(frozen=True, slots=True)
class Example:
    """A checked example, and where it came from.

    Args:
        format: the name in FORMATS.
        source, line, column: as in `Record`.
    """

    shape: Shape
    format: str
    source: str
    line: int
    column: int = 0

    @property
    def place(self) -> str:
        """How the messages name it, as `Record.place`."""
        return place(self.source, self.line, self.column)


@dataclass(frozen=True)
class Format:
    """How to know a format by its keys, and how to read it.

    Args:
        read: record, set that collects keys which are not read -> shape. Raises `Bad`, `Unusable`.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], set[str]], Shape]


def examples(
    sources: Iterable[str | Path], text_field: str, account: Account, limit: Limit = DEFAULT_LIMIT
) -> Iterator[Example]:
    """Every usable example of the sources, in order, while `account` counts all records.

    Args:
        sources: as for `resolve`.
        text_field: the key of the text in files of plain texts. If it is not `text`, a record that has
            it is text whatever else it has.
        limit: of a record.

    Raises:
        UserError: as `records`; a record that fits no format, or another one than the first of its
            file; a value of a wrong type; a file without any usable record.
    """
    for item in resolve(sources, "records"):
        reader = _Reader("text" if holds_text(item) else text_field)
        yield from reader.examples(item, account, limit)


class _Reader:
    """Reads one file: knows its format after the first record."""

    def __init__(self, text_field: str) -> None:
        self.formats = formats(text_field)
        self.name, self.first_line = "", 0
        self.fits: set[tuple[str, ...]] = set()  # keys of records that were found to fit
        self.unread: set[str] = set()

    def examples(self, item: Path | str, account: Account, limit: Limit) -> Iterator[Example]:
        dropped, kept = dict(account.counts), account.kept
        for record in records_in(item, account, limit):
            keys = tuple(record.value)
            if keys not in self.fits:
                self._check(record, keys)
            try:
                shape = self.formats[self.name].read(record.value, self.unread)
                if not shape.encodable():
                    raise Unusable(SURROGATE)
            except Unusable as reason:
                account.drop(str(reason), record.place)
            except Bad as bad:
                raise UserError(f"{record.place}: {bad.what}", bad.hint) from None
            else:
                account.keep()
                yield Example(shape, self.name, record.source, record.line, record.column)
        if account.kept == kept:
            reasons = {why: n - dropped.get(why, 0) for why, n in sorted(account.counts.items())}
            said = "; ".join(f"dropped {n:,}: {why}" for why, n in reasons.items() if n)
            raise UserError(
                f"{item}: no usable record ({said or 'it holds none'})", "mend the file, or leave it out"
            )
        if self.unread:
            account.note(f"{item}: not read: {listed(sorted(self.unread))}")

    def _check(self, record: Record, keys: tuple[str, ...]) -> None:
        """Find the format, and complain of keys that are none; remember those that are fine."""
        name = detect(keys, self.formats)
        began = f"line {self.first_line} is `{self.name}`"
        if name is None:
            raise _no_format(record.place, keys, self.formats, f"; {began}" if self.name else "")
        if not self.name:
            self.name, self.first_line = name, record.line
        if name != self.name:
            raise UserError(
                f"{record.place}: mixed formats: this record is `{name}`, {began}",
                "a file holds one format: put them in files of their own",
            )
        known = {*self.formats[name].required, *self.formats[name].optional}
        for key in keys:
            if key not in known and key not in self.unread:
                self._check_unknown(record.place, key, keys)
        if len(self.fits) < MOST_KEYS:
            self.fits.add(keys)

    def _check_unknown(self, where: str, key: str, keys: tuple[str, ...]) -> None:
        """A key that is one slip away from one that would be read is an error; others are noted."""
        for format in self.formats.values():
            for meant in (*format.required, *format.optional):
                if meant in keys or not slip(key, meant):
                    continue
                found = detect([meant if k == key else k for k in keys], self.formats) or self.name
                if found != self.name or meant in self.formats[found].optional:
                    raise UserError(
                        f"{where}: `{shown(key)}` is not a key of `{found}`",
                        f"did you mean `{meant}`? else rename it, or delete it",
                    )
        if len(self.unread) < MOST_KEYS:
            self.unread.add(key)


def detect(keys: Iterable[str], among: dict[str, Format]) -> str | None:
    """The first format of the table all of whose required keys are there."""
    have = set(keys)
    return next((name for name, format in among.items() if have.issuperset(format.required)), None)


def slip(written: str, meant: str) -> bool:
    """Whether a key is another one with a slip of the finger (two in long ones), or in other case."""
    written, meant = written.lower(), meant.lower()
    most = 2 if len(meant) >= 8 else 1
    if abs(len(written) - len(meant)) > most:
        return False
    before: list[int] = []
    row = list(range(len(meant) + 1))
    for i, a in enumerate(written, 1):
        oldest, before, row = before, row, [i]
        for j, b in enumerate(meant, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == meant[j - 2] and written[i - 2] == b:
                cost = min(cost, oldest[j - 2] + 1)
            row.append(cost)
    return row[-1] <= most


def _no_format(where: str, keys: tuple[str, ...], among: dict[str, Format], began: str) -> UserError:
    said = f"{where}: fits no format: " + (f"keys {listed(keys)}" if keys else "it has no keys")

    def fit(name: str) -> float:
        """Share of the required keys that are there or nearly there; a bit more for those that are."""
        needed = among[name].required
        near = sum(key in keys or nearest(key, list(keys)) is not None for key in needed)
        return near / len(needed) + sum(key in keys for key in needed) / 10

    best = max(among, key=fit)
    if fit(best) == 0:
        return UserError(f"{said}{began}", f"known are {one_of(list(among))}: see docs/data.md")
    wants = among[best].required
    missing = [key for key in wants if key not in keys]
    unknown = [key for key in keys if key not in (*wants, *among[best].optional)]
    close = next((key for key in missing if nearest(key, unknown)), None)
    hint = f"did you mean `{close}`?" if close else f"{best} needs {one_of(missing)} too"
    return UserError(f"{said}; nearest is {best}{began}", hint)


def formats(text_field: str) -> dict[str, Format]:
    """FORMATS with the text under another key, which then comes before all others."""
    if text_field == "text":
        return FORMATS
    text = Format((text_field,), (), partial(convert.plain, text_field))
    return {"text": text, **{name: format for name, format in FORMATS.items() if name != "text"}}


ALPACA = ("input", "system", "history")

# The first format whose required keys are all there is taken, so those that ask for more come first.
# To add one: a function in convert.py, a line here, a row in docs/data.md.
FORMATS: dict[str, Format] = {
    "preference-sharegpt": Format(
        ("conversations", "chosen", "rejected"), ("system", "tools"), convert.sharegpt_preference
    ),
    "preference-alpaca": Format(("instruction", "chosen", "rejected"), ALPACA, convert.alpaca_preference),
    "preference": Format(("prompt", "chosen", "rejected"), ("tools",), convert.preference),
    "preference-implicit": Format(("chosen", "rejected"), ("tools",), convert.implicit_preference),
    "kto": Format(("messages", "label"), ("tools",), convert.labelled),
    "kto-completion": Format(("prompt", "completion", "label"), ("tools",), convert.labelled_completion),
    "alpaca": Format(("instruction", "output"), ALPACA, convert.alpaca),
    "messages": Format(("messages",), ("tools",), convert.chat),
    "sharegpt": Format(("conversations",), ("system", "tools"), convert.sharegpt),
    "prompt-completion": Format(("prompt", "completion"), ("tools",), convert.prompt_completion),
    "text": Format(("text",), (), partial(convert.plain, "text")),
}
