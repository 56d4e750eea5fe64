"""What single entries of a vocabulary stand for, whatever comes before them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.show import BYTE_OF, BYTE_PIECE, special_tokens
from llmctl.tokenizer.special import SPACE


def spelled_alone(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> dict[int, str]:
    """Id -> text. Bytes that are only part of a character are written \\xe4, special tokens as they are.

    An id without an entry, as padded embedding tables have, is written <17>.
    """
    special = special_tokens(tokenizer)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    in_bytes, words = '"ByteLevel"' in json.dumps(decoder), {}
    for token in set(ids):
        entry = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
        if entry is None:
            words[token] = f"<{token}>"
        elif token in special:
            words[token] = special[token]
        elif in_bytes and all(character in BYTE_OF for character in entry):
            words[token] = bytes(BYTE_OF[c] for c in entry).decode("utf-8", "backslashreplace")
        elif found := BYTE_PIECE.fullmatch(entry):
            words[token] = bytes([int(found[1], 16)]).decode("utf-8", "backslashreplace")
        else:
            words[token] = entry.replace(SPACE, " ")
    return words
