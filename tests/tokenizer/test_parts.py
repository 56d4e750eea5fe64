"""Long texts in parts: the ids are those of the whole, for every kind of tokenizer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmctl import cuts
from llmctl.data import decode
from llmctl.data.shards import open_shards
from llmctl.stages.text import encoder_of
from llmctl.talk import SILENT
from llmctl.tokenizer import parts
from llmctl.tokenizer.kinds import KINDS
from llmctl.tokenizer.load import encode_batch, encode_with, starts_with

BLANKS = ["\n", "\n\n", "\r\n", " ", "  ", "\t", "\u2028"]
WORDS = ["a", "Ada", "doesn't", "keep", "7", "1984", "é", "e\u0301", "三", "村有户", "🙂", "▁", "<|eos|>"]
ATOMS = [*BLANKS, *[" "] * 6, *WORDS, *WORDS, ".", ",", "/", "_", "。", "，"]
TEXTS = st.lists(st.sampled_from(ATOMS), min_size=20, max_size=120).map("".join)


def learned(tokenizer: Tokenizer, trainer: trainers.Trainer, texts: list[str]) -> Tokenizer:
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def like_llama_2(texts: list[str]) -> Tokenizer:
    """SentencePiece as Llama 2 has it: a space before the text, no words, merges by rank, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # words only while it learns: so no merge holds a space inside, as in SentencePiece
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+"), "isolated")
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=alphabet, show_progress=False)
    learned(tokenizer, trainer, texts)
    tokenizer.pre_tokenizer = None
    return tokenizer


def like_t5(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return learned(tokenizer, trainer, texts)


def like_gpt_2(texts: list[str], space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    return learned(tokenizer, trainer, texts)


FOREIGN = {
    "llama-2": like_llama_2,
    "t5": like_t5,
    "gpt-2": like_gpt_2,
    "roberta-with-space": partial(like_gpt_2, space=True),
}


@pytest.fixture(scope="module")
def backends(of_kind, mixed) -> dict[str, Tokenizer]:
    """Ours and those of others."""
    ours = {kind: tokenizer.backend_tokenizer for kind, tokenizer in of_kind.items()}
    return ours | {name: make(mixed) for name, make in FOREIGN.items()}


def small(monkeypatch: pytest.MonkeyPatch, part: int = 40) -> None:
    monkeypatch.setattr(cuts, "PART", part)
    monkeypatch.setattr(parts, "PART", part)
    monkeypatch.setattr(parts, "AT_ONCE", 2 * part)


@pytest.mark.parametrize("name", [*KINDS, *FOREIGN])
def test_ids_of_the_parts_are_those_of_the_whole(backends, monkeypatch, name):
    backend = backends[name]
    counts = {"cut": 0, "whole": 0}

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(found=st.lists(TEXTS, min_size=1, max_size=3))
    def holds(found: list[str]) -> None:
        whole = [one.ids for one in backend.encode_batch_fast(found, add_special_tokens=False)]
        with monkeypatch.context() as patch:
            small(patch)
            assert parts.needs_parts(found) == (sum(map(len, found)) > 80)
            joints = parts.Joints(
                lambda some: [one.ids for one in backend.encode_batch_fast(some, add_special_tokens=False)]
            )
            for text in found:
                pieces = list(cuts.parts(text, joints.may_cut))
                assert "".join(pieces) == text
                counts["cut" if len(pieces) > 1 else "whole"] += 1
            inside = parts.encode_in_parts(
                lambda some: [one.ids for one in backend.encode_batch_fast(some, add_special_tokens=False)],
                found,
            )
        assert inside == whole

    backend.encode_special_tokens = True
    holds()
    assert counts["cut"] > 20  # else nothing was held


def test_a_tokenizer_that_adds_a_space_gets_the_parts_without_theirs(backends):
    def adds(name: str) -> bool:
        return parts.Joints(
            lambda some: [one.ids for one in backends[name].encode_batch_fast(some, add_special_tokens=False)]
        ).adds_space

    assert {name for name in backends if adds(name)} == {"llama-2"}  # the others add none where there is one


def test_an_id_is_one_object(backends, monkeypatch):
    small(monkeypatch)
    (ids,) = encode_with(backends["word"], ["Ada keep " * 100], special=False)
    assert len(ids) == 200
    assert len({id(one) for one in ids}) == len(set(ids))


def test_starts_count_in_the_whole_text(backends, monkeypatch):
    text = "Ada doesn't keep two old maps; it's 1984 miles away, isn't it? " * 5
    for name in ("byte-bpe", "llama-2", "gpt-2", "sentencepiece"):
        before = starts_with(backends[name], text, special=False)
        with monkeypatch.context() as patch:
            small(patch)
            found = starts_with(backends[name], text, special=False)
        # the first token of a part has the space that its text was given, which has no place of its own
        assert sum(a != b for a, b in zip(found, before, strict=True)) <= len(text) // 20
        assert all(abs(a - b) <= 1 for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize("name", ["byte-bpe", "llama-2", "unigram"])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_shards_of_a_long_document(backends, monkeypatch, tmp_path, name, ending):
    import json

    text = "Ada doesn't keep two old maps; it's 1984 miles away.\nBo keeps a red boat, isn't it? " * 9
    file = tmp_path / f"a.{ending}"
    file.write_text(text if ending == "txt" else json.dumps({"text": text}) + "\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backends[name])
    (whole,) = encode_batch(tokenizer, [text])
    small(monkeypatch, part=90)
    monkeypatch.setattr(decode, "BLOCK", 50)
    found = open_shards([file], "text", encoder_of(tokenizer), tmp_path / "cache", SILENT)
    assert found.ids.tolist() == whole
    assert found.doc_bytes.tolist() == [len(text)]
    assert np.diff(found.doc_start).tolist() == [len(whole)]


def test_what_cannot_be_cut_is_said(backends, monkeypatch, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x" * 1000)
    small(monkeypatch)
    monkeypatch.setattr(cuts, "LONGEST_PART", 100)
    monkeypatch.setattr("llmctl.data.readers.LONGEST_PART", 100)
    monkeypatch.setattr(decode, "BLOCK", 50)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backends["byte-bpe"])
    found = open_shards([file], "text", encoder_of(tokenizer), tmp_path / "cache", SILENT)
    assert found.account.notes == [
        f"no place to cut within 100 characters ({file}): one token there may differ from those of the whole text"
    ]
