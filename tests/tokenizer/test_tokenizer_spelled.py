"""Ids as the texts they complete, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.kinds import KINDS
from llmctl.tokenizer.show import spelled

CHARACTERS = "中 é\U0001f600"


@pytest.mark.parametrize("kind", KINDS)
def test_joined_they_are_the_text(
    kind: str, of_kind: dict[str, PreTrainedTokenizerFast], mixed: list[str]
) -> None:
    tokenizer = of_kind[kind]
    for text in mixed[:60]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = spelled(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_before_them_change_nothing(
    kind: str, of_kind: dict[str, PreTrainedTokenizerFast], mixed: list[str]
) -> None:
    tokenizer = of_kind[kind]
    for number, text in enumerate(mixed[:30]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = spelled(tokenizer, ids)
        # between characters, as an answer begins
        places = [place for place in range(1, len(ids)) if whole[place - 1]]
        if places:
            cut = places[number % len(places)]
            assert spelled(tokenizer, ids[:cut]) + spelled(tokenizer, ids[cut:], before=ids[:cut]) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stand_as_they_are_written(
    kind: str, of_kind: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer = of_kind[kind]
    words = tokenizer("two old maps", add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    texts = spelled(tokenizer, [start, *words, end, end])
    assert texts[0] == "<|im_start|>"
    assert texts[-2:] == ["<|im_end|>", "<|im_end|>"]
    assert "".join(texts[1:-2]) == tokenizer.decode(words)


def test_the_last_byte_completes_a_character(trained: PreTrainedTokenizerFast) -> None:
    ids = trained(CHARACTERS, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(CHARACTERS), "each takes several tokens"
    texts = spelled(trained, ids)
    assert "".join(texts) == CHARACTERS
    assert all(text == "" or text in CHARACTERS for text in texts)
    # a character that is cut off shows as what decoding gives for it, at the last token
    assert spelled(trained, ids[:2]) == ["", "\ufffd"]
    end = trained.eos_token_id
    assert spelled(trained, [*ids[:2], end]) == ["", "\ufffd", trained.eos_token]
