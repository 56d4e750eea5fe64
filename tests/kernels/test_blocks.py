"""Block attention against the dense definition, values and gradients; its layouts against plain predicates."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.blocks import BlockLayout, attend_blocks, attend_blocks_reference, block_layout
from llmctl.kernels.reference import attend_reference

B, H, T, D = 2, 4, 45, 8


def operands(groups: int, length: int = T) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((B, H, length, D), (B, groups, length, D), (B, groups, length, D))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def sliding(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query - key).abs() < 7


def dilated(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    apart = (query - key).abs()
    return (apart <= 12) & (apart % 3 == 0)


def own_block(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query // 8 == key // 8


PATTERNS = {"sliding": (sliding, 6), "dilated": (dilated, 12), "block": (own_block, 7)}


def one_document() -> tuple[torch.Tensor, None]:
    return torch.arange(T)[None], None


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [[5, 1, 20, 19], [30, 15, 0, 0]]
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segment = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(row)) for row in lengths])
    return position, segment


def definition(position, segment, sees, causal) -> torch.Tensor:
    query, key = position[:, :, None], position[:, None]
    mask = sees(query, key)
    if causal:
        mask = mask & (key <= query)
    return mask if segment is None else mask & (segment[:, :, None] == segment[:, None])


@pytest.mark.parametrize("block", [4, 8, 64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [one_document, documents])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layout_is_the_pattern(pattern, rows, causal, block):
    (sees, reach), (position, segment) = PATTERNS[pattern], rows()
    layout = block_layout(position, segment, sees, reach, block, causal)
    assert torch.equal(layout.dense(T), definition(position, segment, sees, causal))


def test_unneeded_blocks_are_not_read():
    position = torch.arange(64)[None]
    aligned = block_layout(position, None, own_block, 7, 8, causal=False)
    assert aligned.key_blocks.tolist() == [[n] for n in range(8)]
    window = block_layout(position, None, sliding, 6, 8, causal=True)
    assert window.key_blocks.tolist() == [[0, -1], *([n - 1, n] for n in range(1, 8))]


def test_rows_that_are_the_same_share_a_mask():
    position, segment = documents()
    same = block_layout(position[:1].expand(B, T), segment[:1].expand(B, T), sliding, 6, 8, causal=True)
    assert same.mask.shape[0] == 1
    assert block_layout(position, segment, sliding, 6, 8, causal=True).mask.shape[0] == B


def layouts(name: str, causal: bool) -> BlockLayout:
    if name in ("one_document", "documents"):
        position, segment = one_document() if name == "one_document" else documents()
        return block_layout(position, segment, sliding, 6, 8, causal)
    position, _ = one_document()
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randint(-1, 6, (6, 2), generator=generator)
    reads = torch.zeros(6, 7, dtype=torch.bool)
    reads[torch.arange(6)[:, None], scattered] = True

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sliding(query, key) | reads[query // 8, key // 8]

    layout = block_layout(position, None, sees, 6, 8, causal, anchors=10, scattered=scattered)
    expected = definition(position, None, sees, False)
    expected[:, :10], expected[:, :, :10] = True, True
    expected = expected & (position[:, None] <= position[:, :, None]) if causal else expected
    assert torch.equal(layout.dense(T), expected)
    return layout


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["one_document", "documents", "anchors and scattered blocks"])
def test_attention_equals_reference(name, causal, groups):
    layout = layouts(name, causal)
    mine, theirs = operands(groups), operands(groups)
    out = attend_blocks(*mine, layout, scale=0.3)
    expected = attend_blocks_reference(*theirs, layout, scale=0.3)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream), expected.backward(upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_usual_scale_and_single_precision():
    layout = layouts("documents", True)
    q, k, v = (x.detach().float().requires_grad_() for x in operands(2))
    out = attend_blocks(q, k, v, layout)
    torch.testing.assert_close(out, attend_reference(q, k, v, layout.dense(T)), atol=2e-6, rtol=1e-5)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_layout_of_another_length_is_refused():
    layout = layouts("one_document", True)
    with pytest.raises(ValueError, match="6 blocks of 8 does not cover 49 tokens"):
        attend_blocks(*operands(2, length=49), layout)
