"""Answers that are wanted or not, as finished rows: encoded and cut as one side of a preference is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from llmctl.data.document import Account, Limit
from llmctl.data.formats import Example, examples
from llmctl.data.shapes import Labelled, Preference
from llmctl.errors import UserError
from llmctl.recipe.tune import PairData
from llmctl.stages.encode import Encoder
from llmctl.stages.pairs import Pair, PairRows, encoded_pairs, fitted_pairs
from llmctl.stages.rows import counted
from llmctl.talk import Talk


@dataclass(frozen=True)
class LabelledRows:
    """Answers of one data set: pairs without a rejected side, and by its place whether each is wanted."""

    rows: PairRows
    wanted: dict[str, bool]


def read_labelled(
    sources: list[str], data: PairData, tokenizer: PreTrainedTokenizerFast, max_length: int, talk: Talk
) -> LabelledRows:
    """All records of some sources. Says what was read, kept, dropped and cut.

    Raises UserError: as `read_pairs`, for records without a label.
    """
    account, encoder, wanted = Account(noun="record"), Encoder(tokenizer), {}

    limit = Limit(data.max_document_mb)

    def labelled() -> Iterator[Example]:
        for example in counted(examples(sources, "text", account, limit), talk):
            wanted[example.place] = labelled_shape(example).label
            yield example

    found = encoded_labelled(encoder, labelled())
    return LabelledRows(fitted_pairs(found, encoder, account, data, max_length, talk), wanted)


def encoded_labelled(encoder: Encoder, found: Iterable[Example]) -> Iterator[Pair]:
    """Labelled answers as pairs without a rejected side, whatever their length, in order."""
    for pair in encoded_pairs(encoder, map(_as_preference, found)):
        yield replace(pair, rejected_ids=[])


def labelled_shape(example: Example) -> Labelled:
    """The shape of a labelled record. Raises UserError for any other."""
    if not isinstance(example.shape, Labelled):
        raise UserError(
            f"{example.place}: no label: the record is `{example.format}`",
            "a labelled answer has `label`, true or false; see the formats in docs/data.md",
        )
    return example.shape


def _as_preference(example: Example) -> Example:
    """The answer as both sides of a preference, which is what encodes and checks it."""
    shape = labelled_shape(example)
    return replace(example, shape=Preference(shape.prompt, shape.completion, shape.completion, shape.tools))
