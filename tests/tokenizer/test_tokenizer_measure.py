"""`eval` and `show`: figures worked out by hand, and any kind of tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.tokenizer.evaluate import evaluate_tokenizer
from llmctl.tokenizer.show import pieces
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def word_tokenizer():
    """Knows two words; everything else is unknown."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "blue": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.fixture(scope="module")
def sentencepiece_like():
    """The Llama 2 way: a space is U+2581, one is put in front, unknown characters fall back to bytes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("\u2581", "a", "b", "\u2581a"):
        vocab[piece] = len(vocab)
    backend = Tokenizer(
        models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_figures_by_hand(word_tokenizer):
    row = evaluate_tokenizer(word_tokenizer, iter(["red blue", "red", "red  été"]))
    speed = row.pop("megabytes_per_second")
    assert speed > 0
    assert row == {
        "documents": 3,
        "bytes": 8 + 3 + 10,
        "tokens": 5,
        "bytes_per_token": pytest.approx(21 / 5),
        "fertility": pytest.approx(5 / 5),
        "tokens_per_character": pytest.approx(5 / 19),
        "unknown_rate": pytest.approx(1 / 5),
        "round_trip": pytest.approx(2 / 3),
    }


def test_a_byte_level_tokenizer_is_faithful_and_larger_is_shorter(trained, texts):
    small = train_tokenizer("byte-bpe", iter(texts), 300, 2)
    unseen = [*texts[:50], "中文 <|eos|>"]
    large_row, small_row = (evaluate_tokenizer(t, iter(unseen)) for t in (trained, small))
    for row in (large_row, small_row):
        assert (row["round_trip"], row["unknown_rate"]) == (1.0, 0.0)
    assert large_row["bytes_per_token"] > 1.2 * small_row["bytes_per_token"]


def test_more_texts_than_one_batch(word_tokenizer):
    row = evaluate_tokenizer(word_tokenizer, iter(["red"] * 1000))
    assert (row["documents"], row["tokens"], row["round_trip"]) == (1000, 1000, 1.0)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_to_measure(word_tokenizer, texts):
    with pytest.raises(UserError) as caught:
        evaluate_tokenizer(word_tokenizer, iter(texts))
    assert caught.value.message == "there is no text to measure a tokenizer on"
    assert caught.value.hint == "name files with text in them"


@pytest.mark.parametrize("text", ["Anna's é 中 12345\n\n  x", "<|im_start|>user", "🙂", ""])
def test_pieces_of_a_byte_level_tokenizer_join_to_the_text(trained, text):
    found = pieces(trained, text)
    assert b"".join(raw for _, _, raw in found).decode() == text
    assert [token for token, _, _ in found] == trained(text, add_special_tokens=False)["input_ids"]


def test_pieces_show_id_entry_and_bytes(trained):
    anna = trained.convert_tokens_to_ids("ĠAnna")
    assert pieces(trained, " Anna<|im_end|>") == [(anna, "ĠAnna", b" Anna"), (4, "<|im_end|>", b"<|im_end|>")]


def test_pieces_of_other_tokenizers(word_tokenizer, sentencepiece_like):
    assert [(p, raw) for _, p, raw in pieces(word_tokenizer, "red été")] == [
        ("red", b"red"),
        ("[UNK]", "été".encode()),
    ]
    found = [(p, raw) for _, p, raw in pieces(sentencepiece_like, "b aé")]
    assert found == [
        ("\u2581", b""),
        ("b", b"b"),
        ("\u2581a", b" a"),
        ("<0xC3>", b"\xc3"),
        ("<0xA9>", b"\xa9"),
    ]
