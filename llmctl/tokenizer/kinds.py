"""The kinds of tokenizer, one table: how each is built, and how it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmctl.errors import UserError, one_of

PAD = "<|pad|>"
BOS = "<|bos|>"
EOS = "<|eos|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN_START, TURN_END)  # their ids are 0, 1, 2, 3, 4

BYTES = 256

# Where a merge may not cross: English contractions; a word with the one character before it (mostly
# a space); up to three digits; a run of other signs with the line breaks after it; line breaks;
# spaces. This is the split of Llama 3, letter for letter, because GGUF stores no split, only the
# name of a known one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Kind:
    """One algorithm.

    Args:
        smallest: the least `vocab_size`, special tokens included.
        needs: what takes up the smallest vocabulary, for the error message.
        build: makes the untrained tokenizer and the trainer from (vocab_size, min_frequency).
    """

    smallest: int
    needs: str
    build: Callable[[int, int], tuple[Tokenizer, trainers.Trainer]]


def _byte_bpe(vocab_size: int, min_frequency: int) -> tuple[Tokenizer, trainers.Trainer]:
    """Byte-pair encoding over UTF-8 bytes (Sennrich et al. 2016; GPT-2, Radford et al. 2019).

    Every byte has an entry, so any text can be written and comes back exactly; nothing is unknown.
    """
    # ignore_merges: a whole word of the vocabulary is taken at once, as Llama 3 and GGUF readers do
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    return tokenizer, trainer


def kind_named(name: str, vocab_size: int) -> Kind:
    """The kind of that name.

    Raises:
        UserError: no such kind, or `vocab_size` is below what the kind needs.
    """
    if name not in KINDS:
        raise UserError(f"kind: `{name}` is not one of {one_of(list(KINDS))}", "choose one of them")
    kind = KINDS[name]
    if vocab_size < kind.smallest:
        raise UserError(
            f"vocab_size: {vocab_size} is too small for `{name}`, which needs at least {kind.smallest}",
            f"{kind.needs} take the first {kind.smallest} entries",
        )
    return kind


KINDS: dict[str, Kind] = {
    "byte-bpe": Kind(
        smallest=len(SPECIAL_TOKENS) + BYTES,
        needs=f"{len(SPECIAL_TOKENS)} special tokens and {BYTES} bytes",
        build=_byte_bpe,
    ),
}
