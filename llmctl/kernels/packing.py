"""Integers of a few bits, side by side in 32-bit words, as compressed-tensors' `pack-quantized` stores them.

The codes of a row follow each other without a gap, the lowest bits of the first word first; a code may lie
across two words. A code is stored as its distance from the smallest one, so it is never negative.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Words that hold a row of `count` codes."""
    return -(-count * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [R, N] in -2^(bits-1) … 2^(bits-1)-1 -> int32 words [R, words_for(N, bits)], on the same device."""
    stored = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return _to_bytes(stored, bits) if 8 % bits == 0 else _to_stream(stored, bits)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The int8 codes [R, count] that `pack_words` was given."""
    stored = _from_bytes(words, bits) if 8 % bits == 0 else _from_words(words, bits)
    return (stored[:, :count].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _to_bytes(stored: Tensor, bits: int) -> Tensor:
    """Where no code lies across two bytes, on a little-endian machine: many times as fast as bit by bit."""
    # padding nothing keeps the strides, and the view below needs whole rows
    filled = F.pad(stored.contiguous(), (0, -stored.shape[1] % (WORD // bits))).unflatten(1, (-1, 8 // bits))
    octets = filled[..., 0].clone()
    for place in range(1, 8 // bits):
        octets |= filled[..., place] << (place * bits)
    return octets.view(torch.int32)


def _to_stream(stored: Tensor, bits: int) -> Tensor:
    on_host = stored.cpu().numpy()
    stream = np.unpackbits(on_host[..., None], axis=-1, count=bits, bitorder="little").reshape(
        len(on_host), -1
    )
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % WORD)))
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4").astype(np.int32)
    return torch.from_numpy(words).to(stored.device)


def _from_bytes(words: Tensor, bits: int) -> Tensor:
    """Where no code lies across two bytes: uint8, on a little-endian machine."""
    octets = words.contiguous().view(torch.uint8)
    parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(1)


def _from_words(words: Tensor, bits: int) -> Tensor:
    words = F.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))  # [R, C, bits]: 32 codes each
    stored = torch.empty((*words.shape[:2], WORD), dtype=torch.int32, device=words.device)
    for code in range(WORD):
        word, shift = divmod(code * bits, WORD)
        here = min(bits, WORD - shift)
        found = (words[..., word] >> shift) & ((1 << here) - 1)
        if here < bits:
            found = found | ((words[..., word + 1] & ((1 << (bits - here)) - 1)) << here)
        stored[..., code] = found
    return stored.flatten(1)
