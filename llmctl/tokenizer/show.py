"""A text piece by piece, as a tokenizer sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.special import SPACE
from llmctl.tokenizer.stream import TextStream

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, str, bytes]]:
    """(id, entry of the vocabulary, UTF-8 bytes it stands for) of every token of `text`.

    Special tokens written in the text are taken as such; none is added. The bytes joined are the text,
    but for what a normalizer or a splitter drops. Of tokens that stand for one and the same place, the
    first has all its bytes, unless each of them is a byte.
    """
    backend = tokenizer.backend_tokenizer
    encoded = backend.encode(text, add_special_tokens=False)
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    found = []
    rows = zip(encoded.ids, encoded.tokens, encoded.offsets, strict=True)
    for (start, end), group in groupby(rows, key=lambda row: row[2]):
        same = [(token, piece) for token, piece, _ in group]
        if byte_level and not special.issuperset(piece for _, piece in same):
            raw = [bytes(BYTE_OF[character] for character in piece) for _, piece in same]
        else:
            raw = _shares([piece for _, piece in same], text[start:end])
        found += [(token, piece, part) for (token, piece), part in zip(same, raw, strict=True)]
    return found


def spelled(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """For each id the text it completes; joined they are the text, special tokens as they are written.

    The last id of a character has the whole character, those before it nothing.

    Args:
        before: ids that come before these, so that the first one keeps the space it begins with.
    """
    special = special_tokens(tokenizer)
    stream, texts = TextStream(tokenizer, list(before)), [""]
    for token in ids:
        if token in special:
            texts[-1] += stream.rest()
            texts.append(special[token])
        else:
            texts.append(stream.add(token))
    texts[-1] += stream.rest()
    return texts[1:]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Id -> text of all special tokens."""
    return {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items() if token.special}


def _shares(entries: list[str], text: str) -> list[bytes]:
    """The bytes of `text` that each of the entries at one place stands for."""
    matches = [BYTE_PIECE.fullmatch(entry) for entry in entries]
    single = [bytes([int(match[1], 16)]) for match in matches if match]
    if len(single) == len(entries) and b"".join(single) == text.encode():
        return single
    first, others = entries[0], entries[1:]
    if first.strip(SPACE) == "" and text.strip(SPACE) and not text.isspace():
        # a space that the tokenizer put before the text itself
        return [b"", *(_shares(others, text) if others else [])]
    return [text.encode(), *(b"" for _ in others)]


def _byte_characters() -> dict[str, int]:
    """The visible character that byte-level vocabularies write for each byte (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves; the rest are numbered on from U+0100.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }


BYTE_OF = _byte_characters()
