"""FlashAttention in plain torch against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.flash import Band, Tiles, flash_attention
from llmctl.kernels.reference import attend_reference

B, H, S, D = 2, 4, 37, 8

BANDS = {
    "causal": Band(),
    "open": Band(causal=False),
    "sliding": Band(window=9),
    "both ways": Band(causal=False, window=5),
}


def operands(groups: int, queries: int = S, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((B, H, queries, D), (B, groups, S, D), (B, groups, S, D))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def mask_of(band: Band, queries: int) -> torch.Tensor:
    query, key = torch.arange(S)[S - queries :, None], torch.arange(S)[None]
    seen = torch.ones(queries, S, dtype=torch.bool)
    if band.causal:
        seen &= key <= query
    if band.window is not None:
        seen &= (query - key).abs() < band.window
    return seen


@pytest.mark.parametrize("tiles", [Tiles(8, 4), Tiles(5, 16), Tiles()], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [S, 11, 1])
@pytest.mark.parametrize("band", BANDS)
def test_tiles_equal_the_definition(band, queries, groups, tiles):
    mine, theirs = operands(groups, queries), operands(groups, queries)
    mask = mask_of(BANDS[band], queries)
    out, lse = flash_attention(*mine, BANDS[band], tiles)
    expected = attend_reference(*theirs, mask.expand(B, -1, -1))
    scores = theirs[0] @ theirs[1].repeat_interleave(H // groups, 1).transpose(-1, -2) / D**0.5
    sums = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, sums)
    upstream, of_sums = torch.randn_like(out), torch.randn_like(lse)
    ((out * upstream).sum() + (lse * of_sums).sum()).backward()
    ((expected * upstream).sum() + (sums * of_sums).sum()).backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_scale_of_its_own_and_values_of_another_width():
    q, k, _ = operands(2)
    v = torch.randn(B, 2, S, 3, dtype=torch.float64)
    out, _ = flash_attention(q, k, v, Band(scale=0.7))
    expected = attend_reference(q * (0.7 * D**0.5), k, v, mask_of(Band(), S).expand(B, -1, -1))
    torch.testing.assert_close(out, expected)


def test_sums_are_in_single_precision():
    q, k, v = operands(2, dtype=torch.bfloat16)
    out, lse = flash_attention(q, k, v, Band())
    exact = attend_reference(q.double(), k.double(), v.double(), mask_of(Band(), S).expand(B, -1, -1))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)
