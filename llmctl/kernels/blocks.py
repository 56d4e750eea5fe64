"""Attention that reads a few blocks of keys for each block of queries: local patterns without a dense mask.

Shape legend: B rows, H query heads, G key/value heads, R = H / G, T tokens (queries and keys alike), D head width,
C tokens of a block, N blocks of a row, M key blocks that a query block reads, A rows of masks (B, or 1 for all).

The work is B · H · N · C · (M · C) scores instead of B · H · T · T. Queries that see everything, such as Longformer's
global tokens (Beltagy et al. 2020, arXiv:2004.05150), are computed apart as dense rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.kernels.reference import attend_reference

Sees = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockLayout:
    """Which key blocks each query block reads, and what it sees in them.

    Attributes:
        block: tokens of a block, C.
        key_blocks: [N, M], -1 for none; no block twice in a row of it.
        mask: [A, N, C, M · C] boolean, True where a query sees a key of its gathered blocks.
        anchors: so many first tokens of a row are queries that read all keys instead.
        anchor_mask: [A, anchors, T] boolean, what they see; None without anchors.
    """

    block: int
    key_blocks: Tensor
    mask: Tensor
    anchors: int = 0
    anchor_mask: Tensor | None = None

    def dense(self, length: int) -> Tensor:
        """The same as a mask [A, T, T]: the definition."""
        masks, (blocks, reads), size = self.mask.shape[0], self.key_blocks.shape, self.block
        tiles = self.mask.new_zeros(
            masks, blocks, blocks + 1, size, size
        )  # the last one takes what -1 points at
        mine = self.mask.unflatten(3, (reads, size)).transpose(2, 3)
        for m in range(reads):
            tiles[:, torch.arange(blocks), self.key_blocks[:, m]] |= mine[:, :, m]
        whole = tiles[:, :, :blocks].transpose(2, 3).reshape(masks, blocks * size, blocks * size)
        whole = whole[:, :length, :length].clone()
        if self.anchor_mask is not None:
            whole[:, : self.anchors] = self.anchor_mask
        return whole


def attend_blocks(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, layout: BlockLayout, scale: float | None = None
) -> Tensor:
    """Attention output [B, H, T, D], equal to `attend_blocks_reference`. T need not be a multiple of the block.

    Every query must see at least one key. Scores are multiplied by `scale`, 1 / sqrt(D) when None.
    """
    rows, heads, length, width = q_BHTD.shape
    groups, (blocks, _), size = k_BGTD.shape[1], layout.key_blocks.shape, layout.block
    if not blocks - 1 < length / size <= blocks:
        raise ValueError(f"a layout of {blocks} blocks of {size} does not cover {length} tokens")
    repeat = heads // groups
    fill = (0, 0, 0, blocks * size - length)
    q = F.pad(q_BHTD, fill).unflatten(2, (blocks, size)).unflatten(1, (groups, repeat))
    # the heads of a group read the same keys, so they become further queries of one kernel call
    q = q.transpose(2, 3).reshape(rows * groups, blocks, repeat * size, width)
    k, v = (_gathered(F.pad(x, fill), layout) for x in (k_BGTD, v_BGTD))
    mask = layout.mask
    if mask.shape[0] > 1:
        mask = mask[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
    if repeat > 1:
        mask = mask[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.view(rows, groups, blocks, repeat, size, v_BGTD.shape[-1]).transpose(2, 3)
    out = out.reshape(rows, heads, blocks * size, -1)[:, :, :length]
    if layout.anchor_mask is None:
        return out
    first = F.scaled_dot_product_attention(
        q_BHTD[:, :, : layout.anchors],
        k_BGTD,
        v_BGTD,
        attn_mask=layout.anchor_mask[:, None],
        scale=scale,
        enable_gqa=repeat > 1,
    )
    return torch.cat([first, out[:, :, layout.anchors :]], dim=2)


def _gathered(x_BGTD: Tensor, layout: BlockLayout) -> Tensor:
    """[B · G, N, M · C, D]: for each query block the key blocks it reads; any block where there is none."""
    blocks, size = layout.key_blocks.shape[0], layout.block
    whole = x_BGTD.reshape(-1, blocks, size, x_BGTD.shape[-1])
    read = whole.index_select(1, layout.key_blocks.clamp(min=0).flatten())
    return read.view(len(whole), blocks, -1, x_BGTD.shape[-1])


def attend_blocks_reference(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, layout: BlockLayout, scale: float | None = None
) -> Tensor:
    """The definition: softmax attention under the layout's dense mask."""
    width = q_BHTD.shape[-1]
    q = q_BHTD if scale is None else q_BHTD * (scale * math.sqrt(width))
    return attend_reference(q, k_BGTD, v_BGTD, layout.dense(q.shape[2]))


def block_layout(
    position_BT: Tensor,
    segment_BT: Tensor | None,
    sees: Sees,
    reach: int,
    block: int,
    causal: bool,
    anchors: int = 0,
    scattered: Tensor | None = None,
) -> BlockLayout:
    """The layout of a local pattern over rows in which nothing is cached.

    Args:
        position_BT: positions in their documents, which increase by one within a document; [1, T] serves all rows.
        segment_BT: names the document of each token; None is one document a row.
        sees: whether a query position sees a key position; it is given tensors that broadcast.
        reach: a query sees no key further away than this, except anchors and in `scattered` blocks.
        anchors: so many first tokens of a row are seen by all and see all; only where every row is one document.
        scattered: [N, X] further key blocks of each query block, where `sees` decides too; -1 for none.
    """
    length = position_BT.shape[1]
    blocks = -(-length // block)
    near = math.ceil(reach / block)
    offsets = torch.arange(-near, 1 if causal else near + 1, device=position_BT.device)
    here = torch.arange(blocks, device=position_BT.device)
    parts = [here[:, None] + offsets]
    if anchors:
        parts.insert(0, torch.arange(-(-anchors // block), device=here.device).expand(blocks, -1))
    if scattered is not None:
        parts.append(scattered.to(here.device))
    key_blocks = _no_block_twice(torch.cat(parts, dim=1), blocks)

    position, segment = _shared(position_BT), None if segment_BT is None else _shared(segment_BT)
    index = torch.arange(blocks * block, device=here.device)[None]
    tokens = _Tokens(_filled(position, index), None if segment is None else _filled(segment, index), index)
    allowed = _Allowed(sees, causal, anchors, length)
    mask = allowed(tokens.queries(block), tokens.keys(block, key_blocks))
    mask = mask & (key_blocks >= 0).repeat_interleave(block, dim=1)[None, :, None]
    key_blocks, mask = _without_unseen(key_blocks, mask, block)
    mask |= ~mask.any(
        -1, keepdim=True
    )  # tokens that only fill the last block: a softmax of nothing is not a number
    anchor_mask = None
    if anchors:
        row = _Tokens(position, segment, index[:, :length])
        anchor_mask = allowed(row.first(anchors), row.row())
    return BlockLayout(block, key_blocks, mask, anchors, anchor_mask)


@dataclass(frozen=True)
class _Tokens:
    """Position, document and place of tokens, in shapes that broadcast against each other."""

    position: Tensor
    segment: Tensor | None
    index: Tensor

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Tokens:
        segment = None if self.segment is None else change(self.segment)
        return _Tokens(change(self.position), segment, change(self.index))

    def queries(self, block: int) -> _Tokens:
        """[A, N, C, 1]."""
        return self._each(lambda x: x.unflatten(1, (-1, block))[..., None])

    def keys(self, block: int, key_blocks: Tensor) -> _Tokens:
        """[A, N, 1, M · C]."""
        return self._each(lambda x: x.unflatten(1, (-1, block))[:, key_blocks].flatten(2)[:, :, None])

    def first(self, count: int) -> _Tokens:
        """[A, count, 1]."""
        return self._each(lambda x: x[:, :count, None])

    def row(self) -> _Tokens:
        """[A, 1, T]."""
        return self._each(lambda x: x[:, None])


@dataclass(frozen=True)
class _Allowed:
    """What a query may see: the pattern or an anchor, its own document, and nothing later if causal."""

    sees: Sees
    causal: bool
    anchors: int
    length: int

    def __call__(self, query: _Tokens, key: _Tokens) -> Tensor:
        allowed = self.sees(query.position, key.position)
        if self.anchors:
            allowed = allowed | (key.index < self.anchors) | (query.index < self.anchors)
        allowed = allowed & (key.index < self.length)
        if self.causal:
            allowed = allowed & (key.position <= query.position)
        if query.segment is not None and key.segment is not None:
            allowed = allowed & (query.segment == key.segment)
        return allowed


def _shared(x_BT: Tensor) -> Tensor:
    """[1, T] where all rows are the same: one mask then serves them all."""
    return x_BT[:1] if bool((x_BT == x_BT[:1]).all()) else x_BT


def _filled(x_AT: Tensor, index: Tensor) -> Tensor:
    """Up to whole blocks; what is there is never seen."""
    return F.pad(x_AT, (0, index.shape[1] - x_AT.shape[1]))


def _no_block_twice(key_blocks: Tensor, blocks: int) -> Tensor:
    """-1 where a block is outside the row, or stands in the same row of `key_blocks` already."""
    twice = (key_blocks[:, :, None] == key_blocks[:, None, :]).tril(-1).any(-1)
    return key_blocks.masked_fill(twice | (key_blocks < 0) | (key_blocks >= blocks), -1)


def _without_unseen(key_blocks: Tensor, mask: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks in which a query block sees nothing are not read, and the others move together."""
    tiles = mask.unflatten(3, (-1, block))
    seen_NM = tiles.any(4).any(2).any(0)
    kept = max(1, int(seen_NM.sum(1).max()))
    order = (~seen_NM).long().argsort(dim=1, stable=True)[:, :kept]
    found = seen_NM.gather(1, order)
    tiles = tiles.gather(3, order[None, :, None, :, None].expand(len(tiles), -1, block, -1, block))
    return key_blocks.gather(1, order).masked_fill(~found, -1), tiles.flatten(3).contiguous()
