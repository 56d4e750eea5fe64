"""How each kind of tokenizer learns from texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmctl.errors import UserError
from llmctl.tokenizer.entries import frequent, left_out, merged, numbered, settled
from llmctl.tokenizer.special import (
    BOS,
    ESCAPE,
    ESCAPED_ESCAPE,
    ESCAPED_SPACE,
    SPACE,
    SPECIAL_TOKENS,
    UNKNOWN,
    WITH_UNKNOWN,
)

BYTES = 256

# Where a merge may not cross: English contractions; a word with the one character before it (mostly
# a space); up to three digits; a run of other signs with the line breaks after it; line breaks;
# spaces. This is the split of Llama 3, letter for letter, because GGUF stores no split, only the
# name of a known one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What a piece of SentencePiece may cover: spaces and then letters of one group of scripts, digits, or
# other signs. Line breaks stay apart, so that what ends with one begins anything that goes on after it.
# Every limit lies between two characters whatever stands around them. So a reader that does not split
# at all, but merges by rank (llama.cpp), finds the same ids.
CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"
SCRIPTS = (
    rf"[\r\n]+|{SPACE}*[{CJK}]+|{SPACE}*(?:(?![{CJK}])[\p{{L}}\p{{M}}])+|{SPACE}*\p{{N}}+"
    rf"|{SPACE}*[^\s{SPACE}\p{{L}}\p{{M}}\p{{N}}]+|{SPACE}+|[^\S\r\n]+"
)

MARK = "\ufffd"  # the beginning of a word while WordPiece learns; cleaning takes it out of texts

# Rare characters take entries before anything is merged, and are thrown out afterwards. So this many
# entries more are learned than asked for; a text of more different characters gets fewer merges.
SPARE = 1 << 15

Batches = Iterator[list[str]]


@dataclass(frozen=True)
class Learned:
    """What came of a text: the tokenizer, and the characters without an entry, with their counts."""

    tokenizer: Tokenizer
    left_out: Counter[str]


def byte_bpe(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """Byte-pair encoding over UTF-8 bytes (Sennrich et al. 2016; GPT-2, Radford et al. 2019).

    Every byte has an entry, so any text can be written and comes back exactly; nothing is unknown.
    """
    # ignore_merges: a whole word of the vocabulary is taken at once, as Llama 3 and GGUF readers do
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_split(SPLIT), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _bos_first()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Learned(tokenizer, Counter())


def bpe(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """Byte-pair encoding over characters (Sennrich et al. 2016).

    Words are marked by the space before them and not by an end, so white space comes back.
    """
    front = _Front(None, _split(SPLIT), decoders.Fuse())
    counts, merges = _merges(texts, front, vocab_size, min_frequency)
    room = vocab_size - len(WITH_UNKNOWN)
    kept = frequent(counts, least=room // 2, most=room)
    model = models.BPE(*merged(WITH_UNKNOWN, kept, merges, vocab_size), unk_token=UNKNOWN)
    return Learned(front.around(model, WITH_UNKNOWN), left_out(counts, kept))


def wordpiece(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """WordPiece as in cased BERT (Schuster and Nakajima 2012; Devlin et al. 2019).

    The longest entry that begins the rest of a word is taken; `##` marks one that goes on inside it.
    The entries are those that byte-pair merges make, as in Hugging Face's own trainer. That one depends
    on the order of a hash table; here words begin with a mark, which no text holds after cleaning, so
    that a piece tells where it stands, and the same text gives the same entries.
    """
    words = pre_tokenizers.BertPreTokenizer()
    front = _Front(
        normalizers.BertNormalizer(lowercase=False, strip_accents=False), words, decoders.WordPiece()
    )
    begin = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always", split=False)
    marked = _Front(front.normalizer, pre_tokenizers.Sequence([words, begin]), front.decoder)
    counts, merges = _merges(texts, marked, vocab_size, min_frequency)
    del counts[MARK]

    def goes_on(character: str) -> bool:
        """Whether the cleaned text can have it inside a word: not so signs and Chinese."""
        return len(words.pre_tokenize_str(front.normalizer.normalize_str("a" + character))) == 1

    room = vocab_size - len(WITH_UNKNOWN)
    inside = {character for character in counts if goes_on(character)}
    kept = frequent(counts, least=room // 2, most=room, cost=lambda character: 1 + (character in inside))
    known = {MARK, *kept}
    vocab = [*WITH_UNKNOWN, *kept, *("##" + character for character in kept if character in inside)]
    pieces = (left + right for left, right in merges if known.issuperset(left + right))
    vocab += (piece[1:] if piece[0] == MARK else "##" + piece for piece in pieces)
    model = models.WordPiece(numbered(vocab, vocab_size), unk_token=UNKNOWN)
    return Learned(front.around(model, WITH_UNKNOWN), left_out(counts, kept))


def unigram(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """The likeliest pieces under a unigram model, pruned from many (Kudo 2018)."""
    front = _sentencepiece_front(decoders.Metaspace(prepend_scheme="never"))
    counts: Counter[str] = Counter()
    learner = front.around(models.Unigram(), ())

    def fitting() -> Batches:
        yield from _counted(texts, counts)
        needed = len(_written(front, counts) | {SPACE}) + len(WITH_UNKNOWN)
        if needed > vocab_size:
            raise UserError(
                f"vocab_size: {vocab_size} is too small for `unigram` on this text: its characters alone "
                f"need {needed}",
                "raise it, or take `sentencepiece`, which writes rare characters in bytes",
            )

    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(WITH_UNKNOWN),
        unk_token=UNKNOWN,
        initial_alphabet=[SPACE],
        show_progress=False,
    )
    learner.train_from_iterator(fitting(), trainer)
    model = models.Unigram(settled(_model(learner)["vocab"], vocab_size), unk_id=WITH_UNKNOWN.index(UNKNOWN))
    return Learned(front.around(model, WITH_UNKNOWN), Counter())


def sentencepiece(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """BPE as SentencePiece does it (Kudo and Richardson 2018), rare characters in bytes, nothing normalized."""
    back = [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback()]
    front = _sentencepiece_front(*back)
    counts, merges = _merges(texts, front, vocab_size, min_frequency)
    del counts[SPACE]
    first = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(BYTES)), SPACE]
    kept = frequent(counts, least=0, most=vocab_size - len(first))
    model = models.BPE(*merged(first, kept, merges, vocab_size), byte_fallback=True)
    return Learned(front.around(model, SPECIAL_TOKENS), left_out(counts, kept))


def word(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """The most frequent words; a run of signs is a word, and so is each Chinese or Japanese character."""
    words = pre_tokenizers.Sequence([_split(f"[{CJK}]"), pre_tokenizers.Whitespace()])
    tokenizer = _Front(None, words, None).around(models.WordLevel(unk_token=UNKNOWN), ())
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(WITH_UNKNOWN),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Learned(tokenizer, Counter())


def char(texts: Batches, vocab_size: int, min_frequency: int) -> Learned:
    """Characters, in the order of Unicode."""
    counts: Counter[str] = Counter()
    for _ in _counted(texts, counts):
        pass
    room = vocab_size - len(WITH_UNKNOWN)
    kept = frequent(counts, least=room, most=room)
    # a BPE that merges nothing takes a text apart in one go
    model = models.BPE(numbered([*WITH_UNKNOWN, *kept], vocab_size), [], unk_token=UNKNOWN)
    return Learned(_Front(None, None, decoders.Fuse()).around(model, WITH_UNKNOWN), left_out(counts, kept))


@dataclass(frozen=True)
class _Front:
    """What stands around a model: text in, and text out."""

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer | None
    decoder: decoders.Decoder | None

    def around(self, model: models.Model, special: Sequence[str]) -> Tokenizer:
        """A tokenizer that begins every text with BOS and knows the special tokens, all in `model`."""
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = self.normalizer
        tokenizer.pre_tokenizer = self.pre_tokenizer
        tokenizer.decoder = self.decoder
        tokenizer.post_processor = _bos_first()
        tokenizer.add_special_tokens(list(special))
        return tokenizer


def _sentencepiece_front(*back: decoders.Decoder) -> _Front:
    """No space is put before a text: its parts, encoded one by one, are the whole."""
    escaping = [normalizers.Replace(ESCAPE, ESCAPED_ESCAPE), normalizers.Replace(SPACE, ESCAPED_SPACE)]
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    unescaping = [decoders.Replace(ESCAPED_SPACE, SPACE), decoders.Replace(ESCAPED_ESCAPE, ESCAPE)]
    return _Front(
        normalizers.Sequence(escaping),
        pre_tokenizers.Sequence([spaces, _split(SCRIPTS)]),
        decoders.Sequence([*back, decoders.Fuse(), *unescaping]),
    )


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _bos_first() -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )


def _counted(texts: Batches, counts: Counter[str]) -> Batches:
    for batch in texts:
        for text in batch:
            counts.update(text)
        yield batch


def _merges(
    texts: Batches, front: _Front, vocab_size: int, min_frequency: int
) -> tuple[Counter[str], list[tuple[str, str]]]:
    """The characters that the model sees, with their counts, and the pairs it merges, the most frequent first."""
    counts: Counter[str] = Counter()
    learner = front.around(models.BPE(), ())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + SPARE, min_frequency=min_frequency, show_progress=False
    )
    learner.train_from_iterator(_counted(texts, counts), trainer)
    model = _model(learner)
    seen = Counter({entry: counts[entry] for entry in model["vocab"] if len(entry) == 1})
    return seen, [(left, right) for left, right in model["merges"]]


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def _written(front: _Front, counts: Counter[str]) -> set[str]:
    """The characters that `front` makes of those of a text."""
    return set(front.normalizer.normalize_str("".join(counts)).replace(" ", SPACE))
