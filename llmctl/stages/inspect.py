"""`llmctl data inspect`: the rows that training would see, and which of their tokens it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import IGNORE, collate
from llmctl.data.document import Account, Limit
from llmctl.data.formats import Example, examples
from llmctl.data.records import DEFAULT_LIMIT
from llmctl.data.shapes import Completion, Labelled, Preference, Text
from llmctl.data.sources import resolve
from llmctl.errors import UserError
from llmctl.recipe.tune import PairData, SftData, SftRecipe
from llmctl.stages.labelled import read_labelled
from llmctl.stages.pairs import Pair, read_pairs
from llmctl.stages.rows import read_rows
from llmctl.stages.text import pad_id_of
from llmctl.stages.tune import Base, prepare_base
from llmctl.talk import Talk
from llmctl.tokenizer.choose import NAMED, OWN
from llmctl.tokenizer.show import special_tokens, spelled

ROWS, PAIRS, LABELLED = "conversations or text", "preferences", "labelled answers"


@dataclass(frozen=True)
class Part:
    """Ids of a row that belong together: all of it, or the prompt or an answer of a preference.

    Args:
        trained: for each id, whether training on it is what the row is for.
        texts: for each id, the text it completes; joined they are the text of the part.
    """

    name: str
    ids: list[int]
    trained: list[bool]
    texts: list[str]


@dataclass(frozen=True)
class Shown:
    """One row.

    Args:
        number: its place among all rows, from 1.
        cut: what is missing of the record; None if nothing is.
        wanted: the label of a labelled answer.
    """

    number: int
    place: str
    format: str
    parts: list[Part]
    cut: str | None = None
    wanted: bool | None = None

    @property
    def tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    @property
    def trained(self) -> int:
        """Tokens that are trained."""
        return sum(sum(part.trained) for part in self.parts)


@dataclass(frozen=True)
class Inspection:
    """Some rows of a data set.

    Args:
        of: how many rows there are.
        template: name or file of the chat template that rendered them; None where none was needed.
        special: ids of special tokens.
        entries: id -> entry of the vocabulary, for the ids in the rows.
    """

    rows: list[Shown]
    of: int
    formats: dict[str, int]
    account: Account
    max_length: int
    template: str | None
    stop_ids: list[int]
    special: frozenset[int]
    entries: dict[int, str]


@dataclass(frozen=True)
class Read:
    """A data set as one of the readers of training made it.

    Args:
        total: rows in it.
        row: index, from 0 -> place, parts, what is cut, label; as in `Shown`.
    """

    total: int
    row: Callable[[int], tuple[str, list[Part], str | None, bool | None]]
    formats: dict[str, int]
    account: Account


def run(recipe: SftRecipe, first: int, count: int, talk: Talk) -> Inspection:
    """Rows `first` (from 1) and the `count` - 1 after it, read, encoded and checked as training does it.

    Preferences go through what reward models and DPO are trained on. Says what was read, kept, dropped
    and cut, and which template is used.

    Raises UserError: as `prepare_base` and the readers of rows; files that no stage trains on together;
    a setting that the data has no use for; fewer than `first` rows.
    """
    found = look(recipe.data.train, recipe.data.text_field, Limit(recipe.data.max_document_mb))
    kind = one_kind(found)
    data = data_section(recipe.data, kind)
    base = base_of(recipe, talk)
    template = None
    if any(not isinstance(one.shape, (Text, Completion)) for one in found.values()):
        template = template_name(base.tokenizer, recipe.data.template)
        talk.say(f"template: {template}")
    read = READERS[kind](data, base, talk)
    if first > read.total:
        raise UserError(
            f"--from {first:,}: the last row is {read.total:,}",
            "begin with that one, or earlier",
        )
    rows = []
    for index in range(first - 1, min(read.total, first - 1 + count)):
        place, parts, cut, wanted = read.row(index)
        rows.append(Shown(index + 1, place, _format_at(place, found), parts, cut, wanted))
    ids = sorted({token for row in rows for part in row.parts for token in part.ids})
    entries = dict(zip(ids, base.tokenizer.convert_ids_to_tokens(ids), strict=True))
    return Inspection(
        rows,
        read.total,
        read.formats,
        read.account,
        base.max_length,
        template,
        base.stop_ids,
        frozenset(special_tokens(base.tokenizer)),
        entries,
    )


def base_of(recipe: SftRecipe, talk: Talk) -> Base:
    """The model's configuration, tokenizer and template, checked as before training."""
    return prepare_base(
        recipe.base,
        device="cpu",
        dtype="float32",
        template=recipe.data.template,
        max_length=recipe.data.max_length,
        talk=talk,
    )


def look(sources: Sequence[str], text_field: str, limit: Limit = DEFAULT_LIMIT) -> dict[str, Example]:
    """Source -> its first usable record, which says what the file holds. Raises UserError as `examples`."""
    return {
        str(item): next(iter(examples([item], text_field, Account(), limit)))
        for item in resolve(sources, "records")
    }


def kind_of(example: Example) -> str:
    """What training makes of a record: `ROWS`, `PAIRS` or `LABELLED`."""
    return {Preference: PAIRS, Labelled: LABELLED}.get(type(example.shape), ROWS)


def one_kind(found: dict[str, Example]) -> str:
    """The kind of all files. Raises UserError if they are of several: no stage trains on both."""
    (name, example), *others = found.items()
    for other, another in others:
        if kind_of(another) != kind_of(example):
            raise UserError(
                f"{name} holds {kind_of(example)} (`{example.format}`), "
                f"but {other} {kind_of(another)} (`{another.format}`)",
                "no stage trains on both: look at them one after the other",
            )
    return kind_of(example)


def data_section(data: SftData, kind: str) -> SftData | PairData:
    """The data section of the stage that trains on such records. Raises UserError for a setting it lacks."""
    if kind == ROWS:
        return data.model_copy(update={"packing": False})
    given = {name: value for name, value in data if name in data.model_fields_set}
    if odd := sorted(given.keys() - PairData.model_fields.keys()):
        raise UserError(f"data.{odd[0]}: {kind} have no such setting", f"leave out data.{odd[0]}")
    return PairData(**given)


def template_name(tokenizer: PreTrainedTokenizerFast, wanted: str) -> str:
    """The chat template in words: as it was asked for, else its name if it has one."""
    if wanted != OWN:
        return wanted
    named = (name for name, text in NAMED.items() if text == tokenizer.chat_template)
    return next(named, "the model's own")


def _format_at(place: str, found: dict[str, Example]) -> str:
    """The format of the record at a place: that of its file."""
    sources = [source for source in found if place.startswith(f"{source}:")]
    return found[max(sources, key=len)].format


# --- rows of each kind ------------------------------------------------------------------------------


def _rows(data: SftData, base: Base, talk: Talk) -> Read:
    made = read_rows(data.train, data, base.tokenizer, base.max_length, talk)
    pieces = made.laid.pieces

    def row(index: int) -> tuple[str, list[Part], str | None, bool | None]:
        batch = collate(made.laid, [index], pad_id=pad_id_of(base.tokenizer))
        ids, trained = batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORE).tolist()
        doc = int(pieces.doc[index])
        begin, end = made.doc_start[doc : doc + 2].tolist()
        at = int(pieces.start[index]) - begin
        cut = f"tokens {at + 1:,}-{at + len(ids):,} of {end - begin:,}" if len(ids) < end - begin else None
        return made.places[doc], [Part("row", ids, trained, spelled(base.tokenizer, ids))], cut, None

    return Read(len(pieces), row, made.formats, made.account)


def _pairs(data: PairData, base: Base, talk: Talk) -> Read:
    made = read_pairs(data.train, data, base.tokenizer, base.max_length, talk)

    def row(index: int) -> tuple[str, list[Part], str | None, bool | None]:
        pair = made.pairs[index]
        answers = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
        return pair.place, _sides(base, pair, answers), _cut(pair), None

    return Read(len(made.pairs), row, made.formats, made.account)


def _labelled(data: PairData, base: Base, talk: Talk) -> Read:
    made = read_labelled(data.train, data, base.tokenizer, base.max_length, talk)

    def row(index: int) -> tuple[str, list[Part], str | None, bool | None]:
        pair = made.rows.pairs[index]
        parts = _sides(base, pair, {"completion": pair.chosen_ids})
        return pair.place, parts, _cut(pair), made.wanted[pair.place]

    return Read(len(made.rows.pairs), row, made.rows.formats, made.rows.account)


def _sides(base: Base, pair: Pair, answers: dict[str, list[int]]) -> list[Part]:
    prompt, tokenizer = pair.prompt_ids, base.tokenizer
    return [
        Part("prompt", prompt, [False] * len(prompt), spelled(tokenizer, prompt)),
        *(
            Part(name, ids, [True] * len(ids), spelled(tokenizer, ids, before=prompt))
            for name, ids in answers.items()
        ),
    ]


def _cut(pair: Pair) -> str | None:
    return f"{pair.cut:,} tokens at the end" if pair.cut else None


READERS: dict[str, Callable[[Any, Base, Talk], Read]] = {ROWS: _rows, PAIRS: _pairs, LABELLED: _labelled}
