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
from llmctl.data.document import Account
from llmctl.data.readers import SURROGATE
from llmctl.data.records import Record, holds_text, records_in
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

MOST_UNREAD = 20  # keys that are named in the note on what is not read


@dataclass(frozen=True, slots=True)
class Example:
    """A checked example, and where it came from.

    Args:
        format: the name in FORMATS.
        source, line: as in `Record`.
    """

    shape: Shape
    format: str
    source: str
    line: int


@dataclass(frozen=True)
class Format:
    """How to know a format by its keys, and how to read it.

    Args:
        read: record, set that collects keys which are not read -> shape. Raises `Bad`, `Unusable`.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], set[str]], Shape]


def examples(sources: Iterable[str | Path], text_field: str, account: Account) -> Iterator[Example]:
    """Every usable example of the sources, in order, while `account` counts all records.

    Args:
        sources: as for `resolve`.
        text_field: the key of the text in files of plain texts. If it is not `text`, a record that has
            it is text whatever else it has.

    Raises:
        UserError: as `records`; a record that fits no format, or another one than the first of its
            file; a value of a wrong type; a file without any usable record.
    """
    for item in resolve(sources, "records"):
        reader = _Reader("text" if holds_text(item) else text_field)
        yield from reader.examples(item, account)


class _Reader:
    """Reads one file: knows its format after the first record."""

    def __init__(self, text_field: str) -> None:
        self.formats = formats(text_field)
        self.name, self.first_line = "", 0
        self.fits: set[tuple[str, ...]] = set()  # keys of records that were found to fit
        self.unread: set[str] = set()

    def examples(self, item: Path | str, account: Account) -> Iterator[Example]:
        dropped, kept = dict(account.counts), account.kept
        for record in records_in(item, account):
            keys = tuple(record.value)
            if keys not in self.fits:
                self._check(record, keys)
            try:
                shape = self.formats[self.name].read(record.value, self.unread)
                if not shape.encodable():
                    raise Unusable(SURROGATE)
            except Unusable as reason:
                account.drop(str(reason), f"{record.source}:{record.line}")
            except Bad as bad:
                raise UserError(f"{record.source}:{record.line}: {bad.what}", bad.hint) from None
            else:
                account.keep()
                yield Example(shape, self.name, record.source, record.line)
        if account.kept == kept:
            reasons = {why: n - dropped.get(why, 0) for why, n in sorted(account.counts.items())}
            said = "; ".join(f"dropped {n:,}: {why}" for why, n in reasons.items() if n)
            raise UserError(
                f"{item}: no usable record ({said or 'it holds none'})", "mend the file, or leave it out"
            )
        if self.unread:
            names = sorted(self.unread)
            more = ", …" if len(names) > MOST_UNREAD else ""
            account.note(f"{item}: not read: {one_of(names[:MOST_UNREAD])}{more}")

    def _check(self, record: Record, keys: tuple[str, ...]) -> None:
        """Find the format, and complain of keys that are none; remember those that are fine."""
        place = f"{record.source}:{record.line}"
        name = detect(keys, self.formats)
        began = f"line {self.first_line} is `{self.name}`"
        if name is None:
            raise _no_format(place, keys, self.formats, f"; {began}" if self.name else "")
        if not self.name:
            self.name, self.first_line = name, record.line
        if name != self.name:
            raise UserError(
                f"{place}: mixed formats: this record is `{name}`, {began}",
                "a file holds one format: put them in files of their own",
            )
        known = {*self.formats[name].required, *self.formats[name].optional}
        for key in keys:
            if key not in known:
                self._check_unknown(place, key, keys)
        if len(self.fits) < 1000:  # data may have other keys in every record
            self.fits.add(keys)

    def _check_unknown(self, place: str, key: str, keys: tuple[str, ...]) -> None:
        """A key that is one slip away from one that would be read is an error; others are noted."""
        for name, format in self.formats.items():
            for meant in (*format.required, *format.optional):
                if meant not in keys and slip(key, meant):
                    mended = [meant if k == key else k for k in keys]
                    found = detect(mended, self.formats)
                    if found != self.name or (name == found and meant in format.optional):
                        raise UserError(
                            f"{place}: `{key}` is not a key of `{found}`",
                            f"did you mean `{meant}`? else rename it, or delete it",
                        )
        if len(self.unread) <= MOST_UNREAD:
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


def _no_format(place: str, keys: tuple[str, ...], among: dict[str, Format], began: str) -> UserError:
    has = f"keys {one_of(list(keys))}" if keys else "it has no keys"
    best, fit = "", 0.0
    for name, format in among.items():
        near = [key in keys or nearest(key, list(keys)) is not None for key in format.required]
        score = sum(near) / len(near) + sum(key in keys for key in format.required) / 10
        if score > fit:
            best, fit = name, score
    if not best:
        return UserError(
            f"{place}: fits no format: {has}{began}", f"known are {one_of(list(among))}: see docs/data.md"
        )
    missing = [key for key in among[best].required if key not in keys]
    unknown = [key for key in keys if key not in (*among[best].required, *among[best].optional)]
    close = next((key for key in missing if nearest(key, unknown)), None)
    return UserError(
        f"{place}: fits no format: {has}; nearest is {best}{began}",
        f"did you mean `{close}`?" if close else f"{best} needs {one_of(missing)} too",
    )


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
