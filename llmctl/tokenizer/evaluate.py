"""How well a tokenizer writes a text: size, coverage, faithfulness, speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.tokenizer.load import encode_batch

BATCH = 256  # texts encoded at a time


def evaluate_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> dict[str, Any]:
    """Measure a tokenizer on texts, read once.

    Returns:
        `documents`, `bytes` (UTF-8), `tokens`, and
        bytes_per_token: higher is shorter sequences;
        fertility: tokens per word between white space; of little meaning for scripts without
            spaces, for which there is tokens_per_character;
        unknown_rate: share of tokens that are the unknown token;
        round_trip: share of documents that come back exactly from their ids;
        megabytes_per_second: encoding only, on the threads the library takes.

    Raises:
        UserError: the texts hold nothing.
    """
    documents = size = words = characters = tokens = unknown = faithful = 0
    seconds = 0.0
    while batch := list(islice(texts, BATCH)):
        begin = time.perf_counter()
        ids = encode_batch(tokenizer, batch)
        seconds += time.perf_counter() - begin
        decoded = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
        for text, row, back in zip(batch, ids, decoded, strict=True):
            documents += 1
            size += len(text.encode())
            words += len(text.split())
            characters += len(text)
            tokens += len(row)
            unknown += row.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
            faithful += back == text
    if tokens == 0:
        raise UserError("there is no text to measure a tokenizer on", "name files with text in them")
    return {
        "documents": documents,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "fertility": tokens / max(words, 1),
        "tokens_per_character": tokens / characters,
        "unknown_rate": unknown / tokens,
        "round_trip": faithful / documents,
        "megabytes_per_second": size / 1e6 / max(seconds, 1e-9),
    }
