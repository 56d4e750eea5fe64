"""What every block of a stack is told about the tokens it sees: positions, documents, causality.

Shape legend: B rows, T new tokens (queries), S all tokens visible so far (keys, new ones last).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.kernels.attention import Visibility
from llmctl.kernels.blocks import BlockLayout, block_layout
from llmctl.model.patterns import Pattern

Causality = Literal["causal", "none"]
# tokens of a block of the local path: large enough for fast products, small enough not to compute much in vain
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 128
LEAST_GAIN = 2  # blocks of a row, over those that one of them reads, from which gathering them pays


@dataclass
class Tokens:
    """Where tokens stand: `position` [B or 1, N] in their document, `segment` [B, N] naming it.

    `segment` None means that all tokens of a row are one document. Padding is a document of its own
    (segment 0), so real tokens never see it and its own rows of the mask are never empty.
    """

    position: Tensor
    segment: Tensor | None = None

    def column(self) -> Tokens:
        """As queries: [B, N, 1], to be compared with a `row()`."""
        return Tokens(self.position[:, :, None], None if self.segment is None else self.segment[:, :, None])

    def row(self) -> Tokens:
        """As keys: [B, 1, N]."""
        return Tokens(self.position[:, None], None if self.segment is None else self.segment[:, None])


@dataclass
class Memory:
    """What cross-attention reads: encoder states `hidden` [B, S, E]; `real` [B, S] is False at padding."""

    hidden: Tensor
    real: Tensor | None = None

    @property
    def visible(self) -> Visibility:
        """Every query sees every real token of the memory."""
        if self.real is None:
            return Visibility("open")
        return Visibility("dense", mask=self.real[:, None, None])


@dataclass
class Context:
    """One forward pass as the mixers see it.

    Attributes:
        queries: the T new tokens.
        keys: all S tokens, the new ones last; the same object as `queries` when nothing is cached.
        causality: whether a query may see later positions; it belongs to the stack, so that no
            pattern can forget it.
        contiguous: every row is one unpadded document whose keys stand at 0 … S-1.
        spans: document lengths over the flattened rows, when nothing is cached and rows are packed.
        rotary: cos and sin [B or 1, 1, T, D/2], set once by the stack that owns the positions.
        bias: what is added to the scores [B or 1, H, T, S], set by the same.
        memory: the encoder's states, in the decoder of an encoder–decoder.
        trace: called with what mixers note of their work, by layer and name; None when nobody looks.
    """

    queries: Tokens
    keys: Tokens
    causality: Causality = "causal"
    contiguous: bool = False
    spans: tuple[int, ...] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    memory: Memory | None = None
    trace: Callable[[int, str, Tensor], None] | None = None
    _seen: dict[Pattern, Visibility] = field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether there are tokens before the new ones."""
        return self.keys.position.shape[1] != self.queries.position.shape[1]

    def note(self, layer: int, name: str, value: Tensor) -> None:
        """Tell whoever traces this pass what a mixer computed."""
        if self.trace is not None:
            self.trace(layer, name, value)

    def visible(self, pattern: Pattern) -> Visibility:
        """What this pattern lets the queries see; computed once a pass, shared by the layers."""
        if pattern not in self._seen:
            self._seen[pattern] = self._visibility(pattern)
        return self._seen[pattern]

    def mask(self, pattern: Pattern) -> Tensor:
        """The definition: [B or 1, T, S], True where the pattern, causality and documents all allow."""
        query, key = self.queries.column(), self.keys.row()
        allowed = pattern.sees(query.position, key.position)
        if self.causality == "causal":
            allowed = allowed & (key.position <= query.position)
        if query.segment is not None and key.segment is not None:
            allowed = allowed & (query.segment == key.segment)
        return allowed

    def starts(self) -> Tensor | None:
        """True [B, T] at new tokens that begin a document after another one of their row; None where none does.

        Padding begins none, so a document goes on where it was padded in between.
        """
        segment = self.keys.segment
        if segment is None:
            return None
        # documents of a row are numbered in order: the largest so far is that of the last real token
        before = segment.cummax(1).values[:, :-1]
        starts = torch.zeros_like(segment, dtype=torch.bool)
        starts[:, 1:] = (segment[:, 1:] > before) & (before > 0)
        return starts[:, -self.queries.position.shape[1] :]

    def padding(self) -> Tensor | None:
        """True [B, T] at new tokens that are padding; None where none is."""
        return None if self.queries.segment is None else self.queries.segment == 0

    def _visibility(self, pattern: Pattern) -> Visibility:
        T, S = self.queries.position.shape[1], self.keys.position.shape[1]
        if self.bias is not None:
            return Visibility("dense", mask=self.bias.masked_fill(~self.mask(pattern)[:, None], -torch.inf))
        causal = self.causality == "causal"
        if self.contiguous and pattern.sees_all(S):
            if T == 1 or not causal:
                return Visibility("open")
            if T == S:
                return Visibility("causal")
        if self.spans is not None and pattern.sees_all(1 + self._furthest):
            return Visibility("spans", spans=self.spans, causal=causal)
        layout = self._layout(pattern)
        if layout is not None:
            return Visibility("blocks", layout=layout)
        return Visibility("dense", mask=self.mask(pattern)[:, None])

    def _layout(self, pattern: Pattern) -> BlockLayout | None:
        """Blocks for a local pattern, where reading them is less work than a dense mask."""
        reach, draws = pattern.reach, pattern.draws
        causal = self.causality == "causal"
        if reach is None or self.cached or not self._is_stored_in_order:
            return None
        if (pattern.anchors or draws is not None) and not self.contiguous:
            return None  # first tokens and numbers of blocks are those of a row only if it is one document
        if draws is not None and not causal:
            return None  # which later blocks draw a block is not known from the block alone
        T = self.queries.position.shape[1]
        block = draws.size if draws is not None else min(LARGEST_BLOCK, max(SMALLEST_BLOCK, reach + 1))
        blocks = -(-T // block)
        read = 1 + -(-reach // block) * (1 if causal else 2) + (draws.count if draws is not None else 0)
        if blocks < LEAST_GAIN * (read + -(-pattern.anchors // block)):
            return None
        return block_layout(
            self.queries.position,
            self.queries.segment,
            pattern.sees,
            reach,
            block,
            causal,
            pattern.anchors,
            draws.earlier_blocks(blocks) if draws is not None else None,
        )

    @cached_property
    def _furthest(self) -> int:
        """The largest position of a query: documents need not begin at 0, so lengths do not say it."""
        return int(self.queries.position.max())

    @property
    def _is_stored_in_order(self) -> bool:
        """Whether tokens of a document stand next to each other in order of their positions: padding may not."""
        return self.contiguous or self.spans is not None or self.queries.segment is None


def plain_context(length: int, past: int = 0, device: torch.device | str = "cpu") -> Context:
    """Rows without padding or packing: `past` cached tokens, then `length` new ones."""
    keys = Tokens(torch.arange(past + length, device=device)[None])
    queries = keys if past == 0 else Tokens(keys.position[:, past:])
    return Context(queries, keys, contiguous=True)


def packed_context(position_ids: Tensor, by_span: bool = True) -> Context:
    """Rows [B, T] in which several documents follow each other.

    A position that is not one more than the one before it begins a new document (and every row
    does). Documents are isolated from each other.

    `by_span` lets attention take the documents one by one, and reads the positions on the host once;
    False leaves it the mask, whose shape does not depend on where documents end, as a compiled block needs.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    tokens = Tokens(position_ids, starts.cumsum(1))
    if not by_span:
        return Context(tokens, tokens)
    spans = _spans(starts)
    whole = position_ids.shape[0] == len(spans) and bool((position_ids[:, 0] == 0).all())
    return Context(tokens, tokens, contiguous=whole, spans=spans)


def _spans(begins: Tensor) -> tuple[int, ...]:
    """Lengths of what begins where `begins` [B, T] is True, over the flattened rows."""
    first = begins.flatten().nonzero().squeeze(1)
    ends = torch.cat([first[1:], first.new_tensor([begins.numel()])])
    return tuple((ends - first).tolist())


def padded_context(
    attention_mask: Tensor, length: int, position_ids: Tensor | None = None, by_span: bool = True
) -> Context:
    """Rows with padding: `attention_mask` [B, S] is 1 at real tokens; the last `length` are new.

    Positions count the real tokens of a row, unless `position_ids` [B, length] says otherwise. `by_span`: as of
    `packed_context`.
    """
    segment = attention_mask.long()
    if position_ids is not None and length == segment.shape[1]:
        # nothing is cached, so the positions may restart: each restart is a document of its own
        return _padded_documents(segment, position_ids.expand(segment.shape[0], -1), by_span)
    keys = Tokens((segment.cumsum(1) - 1).clamp(min=0), segment)
    queries = Tokens(keys.position[:, -length:], segment[:, -length:])
    if position_ids is not None and not torch.equal(
        position_ids.expand_as(queries.position), queries.position
    ):
        # cached keys keep the counted positions; they differ from the given ones by a constant
        shift = (position_ids[:, -1:] - queries.position[:, -1:]).expand(queries.position.shape[0], 1)
        queries = Tokens(position_ids.expand_as(queries.position), queries.segment)
        keys = Tokens(torch.cat([keys.position[:, :-length] + shift, queries.position], 1), keys.segment)
    return Context(queries, queries if length == attention_mask.shape[1] else keys)


def _padded_documents(real: Tensor, position_ids: Tensor, by_span: bool) -> Context:
    place = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.where(real == 1, place, -1).cummax(1).values
    # the real token before each one, -1 for none: a document goes on where it was padded in between
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    follows = (before >= 0) & (position_ids == position_ids.gather(1, before.clamp(min=0)) + 1)
    starts = (real == 1) & ~follows
    # padding is of segment 0 and counts the places of its gap, so that its rows of the mask are not empty
    tokens = Tokens(torch.where(real == 1, position_ids, place - last - 1), starts.cumsum(1) * real)
    beside = before == place - 1
    if not by_span or bool((follows & (real == 1) & ~beside).any()):
        return Context(tokens, tokens)
    return Context(tokens, tokens, spans=_spans(starts | ((real == 0) & beside)))


def context_of(
    x: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int, by_span: bool
) -> Context:
    """What the keywords of `forward` say of the tokens `x` [B, T, …], of which `past` are cached before."""
    length = x.shape[1]
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"attention_mask must be [rows, tokens], not {mask.dim()}-dimensional")
        if not bool(mask.all()):
            return padded_context(mask, length, position_ids, by_span)
    if position_ids is None:
        return plain_context(length, past, x.device)
    if past == 0 and length > 1:
        return packed_context(position_ids.expand(x.shape[0], -1), by_span)
    everything = torch.ones(x.shape[0], past + length, dtype=torch.long, device=x.device)
    ctx = padded_context(everything, length, position_ids)
    if bool((ctx.queries.position[:, -1] == past + length - 1).all()):
        return plain_context(length, past, x.device)
    return ctx
