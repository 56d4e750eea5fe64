"""The kinds against plain code and against other tokenizers with the same vocabulary."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import BertTokenizerFast

from llmctl.tokenizer.load import encode_batch
from llmctl.tokenizer.special import SPACE
from llmctl.tokenizer.train import train_tokenizer

TEXTS = [
    "Ada doesn't keep two old maps; it's 1984 miles away, isn't it?",
    "东村有12户人家，读书为生。\n西村有7户人家，打鱼为生。",
    "def f(next_item):\n    if next_item > 3:\n\t\treturn [next_item] * 2  # i\n",
    "  two  spaces,\n\n\n   three   and    four  ",
    "unseen: Zürich 🙂 日本語",
    "A rather long-winded sentence about Bo's red boat (1984) and nothing else.",
]


def model_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def entries(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(encode_batch(tokenizer, [text])[0])


def learned_by_hand(words, entries):
    """Byte-pair encoding as Sennrich et al. print it: merge the most frequent pair, again and again.

    `entries` are the characters; of equally frequent pairs the one with the older entries comes first.
    """
    number = {entry: place for place, entry in enumerate(entries)}
    split = {word: list(word) for word in words}
    merges = []
    while True:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(split[word]):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < 2:
            return merges
        left, right = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]))
        merges.append((left, right))
        number.setdefault(left + right, len(number))
        split = {word: joined(parts, left, right) for word, parts in split.items()}


def joined(parts, left, right):
    """`parts` with every `left`, `right` in a row made one."""
    out = []
    for part in parts:
        if out and part == right and out[-1] == left:
            out[-1] = left + right
        else:
            out.append(part)
    return out


def by_rank(merges, parts):
    """What a BPE makes of characters that nothing has split: the pair learned first is merged first."""
    rank = {pair: place for place, pair in reversed(list(enumerate(merges)))}
    while True:
        found = [pair for pair in pairwise(parts) if pair in rank]
        if not found:
            return parts
        parts = joined(parts, *min(found, key=rank.get))


def test_bpe_learns_what_the_paper_learns():
    words = {" low": 5, " lower": 2, " newest": 6, " widest": 3}
    text = "".join(word * count for word, count in words.items())
    tokenizer = train_tokenizer("bpe", iter([text]), 400, 2)
    expected = learned_by_hand(words, sorted(set(text)))
    assert [tuple(pair) for pair in model_of(tokenizer)["merges"]] == expected
    assert ("es", "t") in expected[:3]


def test_sentencepiece_splits_nothing_that_merges_would_join(of_kind):
    """A reader that takes a whole text and merges by rank, as llama.cpp does, finds the same ids."""
    tokenizer = of_kind["sentencepiece"]
    model = model_of(tokenizer)
    merges = [tuple(pair) for pair in model["merges"]]
    for text in TEXTS:
        parts = []
        for character in text.replace(" ", SPACE):
            known = character in model["vocab"]
            parts += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
        assert entries(tokenizer, text) == by_rank(merges, parts)


def test_sentencepiece_is_what_other_readers_take_it_for(of_kind):
    """The layout of Gemma's tokenizer: spaces replaced, no split at all, byte fallback."""
    ours = of_kind["sentencepiece"]
    model = model_of(ours)
    other = Tokenizer(
        models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], byte_fallback=True)
    )
    other.normalizer = normalizers.Replace(" ", SPACE)
    other.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for text, ids in zip(TEXTS, encode_batch(ours, TEXTS), strict=True):
        assert other.encode(text).ids == ids
        assert other.decode(ids) == text


def test_wordpiece_is_bert(of_kind):
    ours = of_kind["wordpiece"]
    names = {"unk_token": "<|unk|>", "pad_token": "<|pad|>", "cls_token": "<|bos|>", "sep_token": "<|eos|>"}
    bert = BertTokenizerFast(
        vocab=ours.get_vocab(), do_lower_case=False, strip_accents=False, mask_token="<|im_end|>", **names
    )
    texts = [*TEXTS, "x" * 101, "\u0000ctrl\u00a0nbsp\u3000wide"]
    for text, ids in zip(texts, encode_batch(ours, texts), strict=True):
        assert bert(text, add_special_tokens=False)["input_ids"] == ids
        assert bert.decode(ids) == ours.decode(ids)


def test_wordpiece_takes_the_longest_entry_first(of_kind):
    vocab = of_kind["wordpiece"].get_vocab()
    for word in ("miles", "smile", "ada", "item", "boats", "keepsake"):
        found, rest = [], word
        while rest:
            mark = "##" if found else ""
            end = max(size for size in range(1, len(rest) + 1) if mark + rest[:size] in vocab)
            found.append(mark + rest[:end])
            rest = rest[end:]
        assert entries(of_kind["wordpiece"], word) == found


def test_wordpiece_has_both_forms_of_a_letter_and_one_of_a_sign(of_kind):
    vocab = of_kind["wordpiece"].get_vocab()
    assert {"a", "##a", "Z", "##Z", ",", "东"} - vocab.keys() == {"Z", "##Z"}
    assert not {"##,", "##东", "##", ""} & vocab.keys()


def best_by_hand(scores, text):
    """The likeliest way to write `text` in pieces: Viterbi over all its beginnings."""
    best = [(0.0, [])] + [(float("-inf"), [])] * len(text)
    for end in range(1, len(text) + 1):
        best[end] = max(
            (best[start][0] + scores[text[start:end]], [*best[start][1], text[start:end]])
            for start in range(max(0, end - 16), end)
            if text[start:end] in scores and best[start][0] > float("-inf")
        )
    return best[-1]


@pytest.mark.parametrize("text", [text for text in TEXTS if text.isascii() and "unseen" not in text])
def test_unigram_finds_the_likeliest_pieces(of_kind, text):
    scores = dict(model_of(of_kind["unigram"])["vocab"][6:])
    known = "".join(c for c in text if c == " " or c in scores)
    likelihood, _ = best_by_hand(scores, known.replace(" ", SPACE))
    found = entries(of_kind["unigram"], known)
    assert "".join(found) == known.replace(" ", SPACE)
    assert sum(scores[entry] for entry in found) == pytest.approx(likelihood, abs=1e-6)


def test_unigram_learns_the_pieces_that_words_share():
    stems, ends = ["harbour", "lantern", "meadow", "orchard"], ["", "s", "keeper", "side", "like", "ed"]
    data = [" ".join(stem + end for stem in stems for end in ends)] * 5
    tokenizer = train_tokenizer("unigram", iter(data), 30, 2)
    assert len(tokenizer) == 30
    for stem in stems:
        assert entries(tokenizer, f"a {stem}keeper")[:2] == ["a", f"{SPACE}{stem}"]


def test_word_keeps_the_most_frequent_words():
    tokenizer = train_tokenizer("word", iter(["b b b a a a c c d. d. 中文 中"]), 12, 2)
    assert tokenizer.convert_ids_to_tokens(range(6, 12)) == ["a", "b", ".", "c", "d", "中"]
    assert entries(tokenizer, "a  c\nx 中文") == ["a", "c", "<|unk|>", "中", "<|unk|>"]
    assert tokenizer.decode(encode_batch(tokenizer, ["a  c\nd.中"])[0]) == "a c d . 中"


def test_char_is_ord_by_rank(of_kind, mixed):
    alphabet = sorted(set("".join(mixed)))
    for text in mixed[:20]:
        assert encode_batch(of_kind["char"], [text]) == [[6 + alphabet.index(c) for c in text]]
