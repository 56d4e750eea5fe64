"""Which entries a vocabulary gets: characters by frequency, merges of these, pieces by likelihood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from llmctl.tokenizer.special import WITH_UNKNOWN

COVERAGE = 0.9995  # share of a text's characters that get entries in any case; SentencePiece's default
SCORE_DIGITS = 6  # of a unigram's log-probabilities; sums differ from the twelfth digit on


def frequent(
    counts: Counter[str], *, least: int, most: int, cost: Callable[[str], int] = lambda _: 1
) -> list[str]:
    """The characters that get entries, in the order of Unicode.

    These are the most frequent ones, until COVERAGE of the text is made of them and `least` entries
    are used, and never more than `most` entries.
    """
    enough = COVERAGE * counts.total()
    kept, covered, used = [], 0, 0
    for character in sorted(counts, key=lambda character: (-counts[character], character)):
        used += cost(character)
        if used > most or (used > least and covered >= enough):
            break
        kept.append(character)
        covered += counts[character]
    return sorted(kept)


def left_out(counts: Counter[str], kept: list[str]) -> Counter[str]:
    """The characters of a text that got no entry, with their counts."""
    known = set(kept)
    return Counter({character: n for character, n in counts.items() if n and character not in known})


def numbered(entries: Iterable[str], vocab_size: int) -> dict[str, int]:
    """The first `vocab_size` different entries, numbered."""
    unique = list(dict.fromkeys(entries))[:vocab_size]
    return {entry: number for number, entry in enumerate(unique)}


def merged(
    first: Sequence[str], kept: list[str], merges: list[tuple[str, str]], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE: `first`, then characters, then what merges of these make."""
    vocab = numbered([*first, *kept], vocab_size)
    known = {entry for entry in vocab if len(entry) == 1}
    used = []
    for left, right in merges:
        if len(vocab) == vocab_size:
            break
        if known.issuperset(left + right):
            vocab.setdefault(left + right, len(vocab))
            used.append((left, right))
    return vocab, used


def settled(vocab: list[tuple[str, float]], vocab_size: int) -> list[tuple[str, float]]:
    """The entries of a unigram model, the likeliest first, made the same in every run.

    The library adds up in the order of a hash table, which shows in the last digits, and tells the
    characters that it did not choose itself apart by that order. These all get the lowest score: no
    two of them ever compete. Where characters leave no room, the library goes past `vocab_size`.
    """
    scores = {entry: round(score, SCORE_DIGITS) for entry, score in vocab if entry not in WITH_UNKNOWN}
    lowest = min(scores.values())
    chosen = min((score for entry, score in scores.items() if len(entry) > 1), default=lowest)
    even = {entry: lowest if len(entry) == 1 and score < chosen else score for entry, score in scores.items()}
    room = vocab_size - len(WITH_UNKNOWN)
    characters_first = sorted(even.items(), key=lambda item: (len(item[0]) > 1, -item[1], item[0]))[:room]
    ranked = sorted(characters_first, key=lambda item: (-item[1], item[0]))
    return [*((token, 0.0) for token in WITH_UNKNOWN), *ranked]
