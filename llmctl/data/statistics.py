"""What a data set is like, counted record by record: no model and no tokenizer is needed."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from llmctl.data.document import EXAMPLES, Account, Limit
from llmctl.data.formats import FORMATS, Example
from llmctl.data.records import DEFAULT_LIMIT, place, records
from llmctl.data.shapes import Completion, Conversation, Labelled, Preference, Shape, Text
from llmctl.data.turns import REASONING, Message, content_of

MARKS = (50, 95)  # percentiles that are told
WANTED, UNWANTED = "wanted", "unwanted"
# The first word of a letter's Unicode name is its script, but for these.
SCRIPTS = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
WIDTHS = ("FULLWIDTH", "HALFWIDTH")  # the script comes second
COMMON = ("MODIFIER", "MATHEMATICAL", "MICRO", "FEMININE", "MASCULINE", "SCRIPT", "DOUBLE", "BLACK", "TURNED")


BATCH, BATCH_CHARACTERS = 512, 1 << 22  # examples held at a time, and their text


class Spread:
    """Whole numbers, eight bytes each, and how they are spread."""

    def __init__(self) -> None:
        self.values = array("q")

    def add(self, value: int) -> None:
        """Count one more."""
        self.values.append(value)

    def summary(self) -> dict[str, int]:
        """count, min, median, p95, max, total; a percentile is the nearest rank, so a value that occurs."""
        import numpy as np

        found = np.frombuffer(self.values, dtype=np.int64)
        if not len(found):
            return {"count": 0}
        median, p95 = (int(value) for value in np.percentile(found, MARKS, method="inverted_cdf"))
        low, high = int(found.min()), int(found.max())
        return {
            "count": len(found),
            "min": low,
            "median": median,
            "p95": p95,
            "max": high,
            "total": int(found.sum()),
        }


class Statistics:
    """Counts over examples; `add` each one, then ask for the `report`.

    Memory grows by about 150 bytes a record, for duplicates and percentiles.
    """

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sources: dict[str, str] = {}  # source -> format
        self.bytes = 0
        self._turns = Spread()
        self._parts: dict[str, tuple[Spread, Spread]] = {}  # role -> characters, bytes of each message
        self._duplicates = _Duplicates()
        self._scripts = _Scripts()
        self._systems: Counter[int] = Counter()  # hash of a system prompt -> records
        self._tools: Counter[str] = Counter()
        self._choices = _Choices()

    def add(self, example: Example) -> None:
        """Count one example."""
        self.formats[example.format] += 1
        self.sources.setdefault(example.source, example.format)
        shape, found = example.shape, parts(example.shape)
        for role, text in found:
            characters, size = self._parts.setdefault(role, (Spread(), Spread()))
            characters.add(len(text))
            raw = len(text) if text.isascii() else len(text.encode())
            size.add(raw)
            self.bytes += raw
        self._duplicates.add(example, found)
        self._scripts.add([text for _, text in found])
        if isinstance(shape, Preference):
            self._choices.add(*(text for role, text in found if role in ("chosen", "rejected")))
        if not isinstance(shape, (Text, Completion)):
            self._add_talk(turns(shape), shape.tools)

    def _add_talk(self, messages: list[Message], tools: object) -> None:
        self._turns.add(sum(message["role"] != "system" for message in messages))
        system = [message["content"] for message in messages if message["role"] == "system"]
        if system:
            self._systems[_hash("\n".join(system))] += 1
        calls = sum(len(message.get("tool_calls", ())) for message in messages)
        self._tools["records_with_tools"] += tools is not None
        self._tools["records_with_calls"] += calls > 0
        self._tools["calls"] += calls

    def report(self) -> dict[str, Any]:
        """Everything counted, as plain values. What no record has is None."""
        talks = len(self._turns.values)
        roles = {role: self._parts[role] for role in ORDER if role in self._parts}
        return {
            "records": sum(self.formats.values()),
            "formats": dict(self.formats.most_common()),
            "turns": self._turns.summary() if talks else None,
            "roles": {
                role: {"characters": characters.summary(), "bytes": size.summary()}
                for role, (characters, size) in roles.items()
            },
            "system_prompts": {"records": self._systems.total(), "distinct": len(self._systems)}
            if talks
            else None,
            "tools": {name: self._tools[name] for name in TOOLS} if talks else None,
            "duplicates": self._duplicates.report(),
            "scripts": self._scripts.report(),
            "preferences": self._choices.report(),
        }


def parts(shape: Shape) -> list[tuple[str, str]]:
    """(role, text) of everything an example says, in order; an answer of several turns is one text."""
    if isinstance(shape, Text):
        return [("text", shape.text)]
    if isinstance(shape, Completion):
        return [("prompt", shape.prompt), ("completion", shape.completion)]
    if isinstance(shape, Conversation):
        return [(message["role"], said(message)) for message in shape.messages]
    found = [(message["role"], said(message)) for message in shape.prompt]
    if isinstance(shape, Labelled):
        return [*found, (WANTED if shape.label else UNWANTED, _joined(shape.completion))]
    return [*found, ("chosen", _joined(shape.chosen)), ("rejected", _joined(shape.rejected))]


def turns(shape: Conversation | Preference | Labelled) -> list[Message]:
    """The messages of a conversation, with the chosen answer or the labelled one."""
    if isinstance(shape, Conversation):
        return shape.messages
    return [*shape.prompt, *(shape.chosen if isinstance(shape, Preference) else shape.completion)]


def said(message: Message) -> str:
    """The text of a message, its reasoning before it, with the JSON of each call of a tool on a line of its own."""
    thought = next((message[name] for name in REASONING if type(message.get(name)) is str), "")
    if not thought and "tool_calls" not in message:
        return content_of(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(filter(None, [thought, content_of(message), *calls]))


def in_batches(found: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples some hundred at a time, fewer where they are long."""
    batch: list[Example] = []
    size = 0
    for example in found:
        batch.append(example)
        size += sum(len(text) for _, text in parts(example.shape))
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(messages: list[Message]) -> str:
    return "\n".join(map(said, messages))


def empty_inputs(sources: dict[str, str], limit: Limit = DEFAULT_LIMIT) -> dict[str, int] | None:
    """Records whose `input` is empty or missing, and records at all, in files of a format that has one.

    The files are read again for it, because a finished example no longer knows.

    Args:
        sources: source -> format.
    """
    having = [source for source, format in sources.items() if _has_input(format)]
    if not having:
        return None
    found = [not str(record.value.get("input") or "").strip() for record in records(having, Account(), limit)]
    return {"records": sum(found), "of": len(found)}


def _has_input(format: str) -> bool:
    return format in FORMATS and "input" in FORMATS[format].optional


class _Duplicates:
    """Records that repeat an earlier one: same roles, labels, tools and words, whatever the white space."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # hash of the content -> where it was first
        self._sources: list[str] = []
        self._count = 0
        self._places: list[dict[str, str]] = []

    def add(self, example: Example, found: list[tuple[str, str]]) -> None:
        words = [f"{role}\x1f{' '.join(text.split())}" for role, text in found]
        tools = None if isinstance(example.shape, (Text, Completion)) else example.shape.tools
        content = _hash("\x1e".join(words) + ("" if tools is None else json.dumps(tools)))
        if not self._sources or self._sources[-1] != example.source:
            self._sources.append(example.source)
        # one number, because a tuple of three would take three times the memory
        here = (len(self._sources) - 1) << 80 | example.line << 40 | example.column
        first = self._first.setdefault(content, here)
        if first != here:
            self._count += 1
            if len(self._places) < EXAMPLES:
                self._places.append({"place": example.place, "first": self._place(first)})

    def _place(self, packed: int) -> str:
        low = (1 << 40) - 1
        return place(self._sources[packed >> 80], packed >> 40 & low, packed & low)

    def report(self) -> dict[str, Any]:
        return {"records": self._count, "places": self._places}


class _Scripts:
    """Letters by script, and which script most letters of each record are of."""

    def __init__(self) -> None:
        self._letters: Counter[str] = Counter()
        self._mainly: Counter[str] = Counter()

    def add(self, texts: Iterable[str]) -> None:
        characters: Counter[str] = Counter()
        for text in texts:
            characters.update(text)
        letters: Counter[str] = Counter()
        for character, count in characters.items():
            name = script(character)
            if name is not None:
                letters[name] += count
        self._letters.update(letters)
        self._mainly[letters.most_common(1)[0][0] if letters else "none"] += 1

    def report(self) -> dict[str, Any]:
        total = self._letters.total()
        found = {
            name: {"letters": count / total, "records": self._mainly[name]}
            for name, count in self._letters.most_common()
        }
        without = self._mainly["none"]
        return found | ({"none": {"letters": 0.0, "records": without}} if without else {})


class _Choices:
    """Which answer of a pair is the longer one."""

    def __init__(self) -> None:
        self._lengths = Spread(), Spread()
        self._longer, self._shorter = 0, 0

    def add(self, chosen: str, rejected: str) -> None:
        for spread, text in zip(self._lengths, (chosen, rejected), strict=True):
            spread.add(len(text))
        self._longer += len(chosen) > len(rejected)
        self._shorter += len(chosen) < len(rejected)

    def report(self) -> dict[str, Any] | None:
        pairs = len(self._lengths[0].values)
        if not pairs:
            return None
        same = pairs - self._longer - self._shorter
        return {
            "pairs": pairs,
            "longer_chosen": self._longer / pairs,
            "shorter_chosen": self._shorter / pairs,
            "same_length": same / pairs,
            # what a rule gets right that looks at nothing but length, ties counting half
            "length_baseline": (max(self._longer, self._shorter) + same / 2) / pairs,
        }


@cache
def script(character: str) -> str | None:
    """The script of a letter, by its Unicode name; None for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return None
    words = unicodedata.name(character, "OTHER").replace("-", " ").split()
    first = words[1] if words[0] in WIDTHS else words[0]
    return SCRIPTS.get(first, "Other" if first in COMMON else first.capitalize())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


# the roles a report tells of, in this order
ORDER = (
    "system",
    "user",
    "assistant",
    "tool",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    WANTED,
    UNWANTED,
    "text",
)
TOOLS = ("records_with_tools", "records_with_calls", "calls")
