"""The kinds of tokenizer, one table: how each learns, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmctl.errors import UserError, one_of
from llmctl.recipe.schema import TokenizerRecipe
from llmctl.tokenizer import learners
from llmctl.tokenizer.learners import BYTES, Batches, Learned
from llmctl.tokenizer.special import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    UNKNOWN,
    WITH_UNKNOWN,
)

__all__ = [
    "BOS",
    "EOS",
    "KINDS",
    "PAD",
    "SPECIAL_TOKENS",
    "TURN_END",
    "TURN_START",
    "UNKNOWN",
    "Kind",
    "kind_named",
]

# The default stands in every recipe, so it is no wish that a kind could fail to grant.
DEFAULT_MIN_FREQUENCY = TokenizerRecipe.model_fields["min_frequency"].default

Keeps = Literal["text", "characters", "words"]


@dataclass(frozen=True)
class Kind:
    """One algorithm.

    Args:
        learn: makes a tokenizer out of (batches of texts, vocab_size, min_frequency).
        smallest: the least `vocab_size`, special tokens included.
        needs: what takes up the smallest vocabulary, for the error message.
        keeps: what comes back from ids: `text`, any text exactly; `characters`, any text exactly that
            is made of characters with an entry; `words`, the known words in their order, but not the
            white space between them.
        unknown: whether it has an unknown token.
        counts: whether `min_frequency` means something to it.
    """

    learn: Callable[[Batches, int, int], Learned]
    smallest: int
    needs: str
    keeps: Keeps
    unknown: bool
    counts: bool

    @property
    def lossless(self) -> bool:
        """Whether every text comes back exactly from its ids."""
        return self.keeps == "text"


def kind_named(name: str, vocab_size: int, min_frequency: int) -> Kind:
    """The kind of that name.

    Raises:
        UserError: no such kind, `vocab_size` is below what the kind needs, or `min_frequency` asks
            for what the kind does not do.
    """
    if name not in KINDS:
        raise UserError(f"kind: `{name}` is not one of {one_of(list(KINDS))}", "choose one of them")
    kind = KINDS[name]
    if vocab_size < kind.smallest:
        raise UserError(
            f"vocab_size: {vocab_size} is too small for `{name}`, which needs at least {kind.smallest}",
            f"{kind.needs} take the first {kind.smallest} entries",
        )
    if min_frequency > DEFAULT_MIN_FREQUENCY and not kind.counts:
        raise UserError(
            f"min_frequency: {min_frequency} means nothing to `{name}`, which learns no merges",
            "leave it out",
        )
    return kind


KINDS: dict[str, Kind] = {
    "byte-bpe": Kind(
        learn=learners.byte_bpe,
        smallest=len(SPECIAL_TOKENS) + BYTES,
        needs=f"{len(SPECIAL_TOKENS)} special tokens and {BYTES} bytes",
        keeps="text",
        unknown=False,
        counts=True,
    ),
    "bpe": Kind(
        learn=learners.bpe,
        smallest=len(WITH_UNKNOWN) + 1,
        needs=f"{len(WITH_UNKNOWN)} special tokens and a character",
        keeps="characters",
        unknown=True,
        counts=True,
    ),
    "wordpiece": Kind(
        learn=learners.wordpiece,
        smallest=len(WITH_UNKNOWN) + 2,
        needs=f"{len(WITH_UNKNOWN)} special tokens and a character, at the beginning of a word and inside it,",
        keeps="words",
        unknown=True,
        counts=True,
    ),
    "unigram": Kind(
        learn=learners.unigram,
        smallest=len(WITH_UNKNOWN) + 2,
        needs=f"{len(WITH_UNKNOWN)} special tokens, the space and a character",
        keeps="characters",
        unknown=True,
        counts=False,
    ),
    "sentencepiece": Kind(
        learn=learners.sentencepiece,
        smallest=len(SPECIAL_TOKENS) + BYTES + 1,
        needs=f"{len(SPECIAL_TOKENS)} special tokens, {BYTES} bytes and the space",
        keeps="text",
        unknown=False,
        counts=True,
    ),
    "word": Kind(
        learn=learners.word,
        smallest=len(WITH_UNKNOWN) + 1,
        needs=f"{len(WITH_UNKNOWN)} special tokens and a word",
        keeps="words",
        unknown=True,
        counts=True,
    ),
    "char": Kind(
        learn=learners.char,
        smallest=len(WITH_UNKNOWN) + 1,
        needs=f"{len(WITH_UNKNOWN)} special tokens and a character",
        keeps="characters",
        unknown=True,
        counts=False,
    ),
}
