"""A text piece by piece, as a tokenizer sees it."""

from __future__ import annotations

import json
import re

from transformers import PreTrainedTokenizerFast

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # how SentencePiece writes a space


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, str, bytes]]:
    """(id, entry of the vocabulary, UTF-8 bytes it stands for) of every token of `text`.

    Special tokens written in the text are taken as such; none is added. Where no normalizer
    changes the text, the bytes joined are the text; a tokenizer that is not byte-level gives the
    bytes of a character split over several tokens to each of them.
    """
    backend = tokenizer.backend_tokenizer
    encoded = backend.encode(text, add_special_tokens=False)
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    found = []
    for token, piece, (start, end) in zip(encoded.ids, encoded.tokens, encoded.offsets, strict=True):
        as_byte = BYTE_PIECE.fullmatch(piece)
        if byte_level and piece not in special:
            raw = bytes(BYTE_OF[character] for character in piece)
        elif as_byte:
            raw = bytes([int(as_byte[1], 16)])
        elif piece.strip(SPACE) == "" and not text[start:end].isspace():
            raw = b""  # a space that the tokenizer put before the text itself
        else:
            raw = text[start:end].encode()
        found.append((token, piece, raw))
    return found


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
