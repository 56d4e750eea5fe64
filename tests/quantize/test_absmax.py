"""Round to nearest, and the scales that everything is rounded to."""

from __future__ import annotations

import pytest
import torch

from llmctl.quantize.absmax import absmax
from llmctl.quantize.scales import absmax_scale, best_scale, code_range, minmax_scale, rounded


def weight(rows: int = 16, columns: int = 256, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random) * torch.rand(rows, 1, generator=random)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_no_weight_moves_more_than_half_a_step(bits: int, group: int | None) -> None:
    w = weight()
    found = absmax(w, bits, group)
    scale = found.scale.repeat_interleave(found.group, 1)
    assert found.scale.shape == (16, 256 // (group or 256)) and found.zero is None
    assert found.group == (group or 256) and found.bits == bits and found.codes.dtype == torch.int8
    assert ((found.dequantize() - w).abs() <= scale * 0.5001).all()
    assert ((found.dequantize() - w).abs() > scale * 0.45).any()
    # the largest of each group has the greatest code, or would have but for the rounding of the scale
    most = found.codes.abs().unflatten(1, (-1, found.group)).amax(-1)
    greatest = code_range(bits)[1]
    assert most.max() == greatest and most.min() >= greatest - (bits == 8)
    assert torch.equal(found.scale, found.scale.bfloat16().float())


def test_by_hand() -> None:
    found = absmax(torch.tensor([[1.75, -0.6, 0.0, 0.25], [0.1, 3.5, -3.5, 0.8]]), 4, 2)
    assert found.scale.tolist() == [[0.25, absmax_scale(torch.tensor([0.25]), 4)], [0.5, 0.5]]
    assert found.codes.tolist() == [[7, -2, 0, 7], [0, 7, -7, 2]]


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_zeros_and_numbers_too_small_for_a_scale(bits: int) -> None:
    w = weight()
    w[3], w[5, 32:64], w[7] = 0.0, 0.0, 1e-41
    found = absmax(w, bits, 32)
    assert found.scale.isfinite().all() and (found.scale > 0).all()
    assert not found.codes[3].any() and not found.codes[5, 32:64].any()
    assert found.codes[5, :32].any()
    assert ((found.dequantize() - w).abs() <= found.scale.repeat_interleave(32, 1) * 0.5001).all()


def test_weights_in_bfloat16_are_read_as_they_are() -> None:
    w = weight().bfloat16()
    narrow, wide = absmax(w, 4, 32), absmax(w.float(), 4, 32)
    assert torch.equal(narrow.codes, wide.codes) and torch.equal(narrow.scale, wide.scale)


@pytest.mark.parametrize("group", [96, 512, 0])
def test_no_whole_groups(group: int) -> None:
    with pytest.raises(ValueError, match=f"256 inputs in groups of {group}"):
        absmax(weight(), 4, group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_best_of_the_shrunk_ranges(bits: int, symmetric: bool) -> None:
    """It costs no more than the whole range in any group, and much less in three bits."""
    w = weight()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4
    groups = w.unflatten(1, (-1, 64))
    scale, zero = best_scale(w, importance, bits, 64, symmetric)
    whole = (absmax_scale(groups, bits), torch.zeros(16, 4)) if symmetric else minmax_scale(groups, bits)

    def cost(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        found = rounded(groups, scale[..., None], 0.0 if zero is None else zero[..., None], bits)
        return ((found - groups).square() * importance.unflatten(0, (-1, 64))).sum(-1)

    assert (zero is None) is symmetric
    assert torch.equal(scale, scale.bfloat16().float())
    assert (cost(scale, zero) <= cost(*whole)).all()
    if bits == 3:
        assert cost(scale, zero).sum() < 0.8 * cost(*whole).sum()
    if zero is not None:
        low, high = code_range(bits)
        assert zero.min() >= low and zero.max() <= high and torch.equal(zero, zero.round())


def test_importance_decides_what_is_cut() -> None:
    """One large weight among small ones is kept where it counts, and cut where it does not."""
    w = torch.linspace(-1, 1, 32)[None].clone()
    w[0, 0] = 3.0
    counts, idle = torch.ones(32), torch.ones(32)
    counts[0], idle[0] = 100.0, 0.0
    kept, cut = (best_scale(w, importance, 3, 32, True)[0].item() for importance in (counts, idle))
    assert kept * 3 > 2.9 and cut * 3 < 1.3


def test_codes_of_one_sign_use_the_whole_range() -> None:
    w = weight().abs() + 1
    for signed in (w, -w):
        scale, zero = minmax_scale(signed.unflatten(1, (-1, 64)), 4)
        found = rounded(signed.unflatten(1, (-1, 64)), scale[..., None], zero[..., None], 4).flatten(1)
        assert zero.unique().tolist() == ([-8] if signed is w else [7])
        assert ((found - signed).abs() <= scale.repeat_interleave(64, 1) * 0.51).all()
