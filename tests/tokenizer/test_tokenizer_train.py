"""Learning: special tokens, limits, faithfulness, the same result twice, Ctrl-C."""

import _thread
import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.tokenizer.kinds import SPECIAL_TOKENS
from llmctl.tokenizer.load import encode_batch, fingerprint
from llmctl.tokenizer.train import train_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "\n\n  \n",
    "\r\n\tx",
    "don't WON'T 1234567890 3.14",
    "naïve café — 中文，没有空格 日本語 🙂‍↔️",
    "\x00\x7f\u200b\ufeff\ud7ff",
    "<|eos|><|im_start|>user<|pad|>",
    "e\u0301 and \u00e9 are not the same",
    "    indented\n        more\n",
]


class Heard:
    """A Talk that remembers."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_it_fills_the_vocabulary_and_round_trips(trained, texts):
    assert len(trained) == 600
    assert tuple(trained.convert_ids_to_tokens(range(len(SPECIAL_TOKENS)))) == SPECIAL_TOKENS
    rows = encode_batch(trained, texts[:50])
    assert trained.batch_decode(rows, skip_special_tokens=True) == texts[:50]


def test_special_ids_and_bos(trained):
    ids = (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id, trained.unk_token_id)
    assert ids == (0, 1, 2, None)
    assert trained.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [3, 4]
    plain = trained("Anna lives here.", add_special_tokens=False)["input_ids"]
    assert trained("Anna lives here.")["input_ids"] == [1, *plain]
    assert 1 not in plain
    assert trained.model_max_length > 10**9
    assert trained.clean_up_tokenization_spaces is False


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_byte_bpe_gives_hard_texts_back(trained, text):
    (row,) = encode_batch(trained, [text])
    assert trained.decode(row, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_byte_bpe_gives_any_text_back(trained, text):
    (row,) = encode_batch(trained, [text])
    assert trained.decode(row, skip_special_tokens=True) == text
    assert all(token >= len(SPECIAL_TOKENS) for token in row)


def test_byte_bpe_splits_numbers_into_groups_of_three_at_most():
    tokenizer = train_tokenizer("byte-bpe", itertools.repeat("year 1984 1984 1984", 500), 300, 2)
    pieces = tokenizer.convert_ids_to_tokens(encode_batch(tokenizer, ["1984"])[0])
    assert pieces == ["198", "4"]


def test_learning_twice_gives_the_same_tokenizer(texts, trained):
    again = train_tokenizer("byte-bpe", iter(texts), 600, 2)
    assert fingerprint(again) == fingerprint(trained)


def test_min_frequency_keeps_rare_merges_out():
    tokenizer = train_tokenizer("byte-bpe", iter(["seldom often often often"]), 400, 3)
    vocabulary = tokenizer.get_vocab()
    assert "Ġoften" in vocabulary
    assert not {"seldom", "Ġseldom", "dom"} & vocabulary.keys()


def test_what_the_data_cannot_fill_is_said():
    heard = Heard()
    tokenizer = train_tokenizer("byte-bpe", iter(["aa aa aa"]), 5000, 2, talk=heard)
    assert len(tokenizer) < 300
    assert heard.said == [
        f"the data fills only {len(tokenizer)} of 5,000 entries; the vocabulary has {len(tokenizer)}"
    ]


@pytest.mark.parametrize(
    ("kind", "texts", "size", "message", "hint"),
    [
        (
            "byte-bpe",
            ["text"],
            260,
            "vocab_size: 260 is too small for `byte-bpe`, which needs at least 261",
            "5 special tokens and 256 bytes take the first 261 entries",
        ),
        (
            "bpee",
            ["text"],
            300,
            "kind: `bpee` is not one of `byte-bpe`, `bpe`, `wordpiece`, `unigram`, `sentencepiece`, `word`, `char`",
            "choose one of them",
        ),
        ("byte-bpe", [], 300, "there is no text to learn a tokenizer from", "name files with text in them"),
        ("byte-bpe", [""], 300, "there is no text to learn a tokenizer from", "name files with text in them"),
        ("unigram", [""], 300, "there is no text to learn a tokenizer from", "name files with text in them"),
        ("char", [], 300, "there is no text to learn a tokenizer from", "name files with text in them"),
    ],
)
def test_what_cannot_be_learned(kind, texts, size, message, hint):
    with pytest.raises(UserError) as caught:
        train_tokenizer(kind, iter(texts), size, 2)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_the_smallest_vocabulary_works():
    assert len(train_tokenizer("byte-bpe", iter(["text"]), 261, 2)) == 261


def test_an_error_in_the_texts_comes_out_as_it_is():
    def broken():
        yield "one"
        raise UserError("data.jsonl:2: not valid JSON")

    with pytest.raises(UserError, match=r"^data\.jsonl:2: not valid JSON$"):
        train_tokenizer("byte-bpe", broken(), 300, 2)


def test_ctrl_c_is_obeyed_and_stops_the_reading():
    read = itertools.count()
    last = 0

    def endless():
        nonlocal last
        for last in read:
            if last == 1000:
                _thread.interrupt_main()
            yield "text"

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer("byte-bpe", endless(), 300, 2)
    until = time.monotonic() + 10
    while any(t.name == "tokenizer training" for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    stopped_at = last
    time.sleep(0.2)
    assert last == stopped_at
