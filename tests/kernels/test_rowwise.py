"""Hand-written gradients against autograd through the definitions."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.rowwise import rms_norm, rms_norm_reference, rotate, rotate_reference


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 7, 16)])
def test_rms_norm_equals_reference(shape):
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(shape) * 3, torch.randn(shape[-1]), torch.randn(shape)
    found = []
    for function in (rms_norm, rms_norm_reference):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(a, w, 1e-5)
        out.backward(upstream)
        found.append((out, a.grad, w.grad))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_rms_norm_of_bfloat16_sums_in_float32():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.ones(256)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rms_norm_reference(x.float(), weight, 1e-5).bfloat16())


def test_frozen_norm_weight_gets_no_gradient():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotate_equals_reference(dtype, rows):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=dtype).transpose(1, 2)
    angles = torch.randn(rows, 1, 5, 4)
    cos, sin = angles.cos(), angles.sin()
    mine = x.clone().requires_grad_()
    exact = x.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out, expected = rotate(mine, cos, sin), rotate_reference(exact, cos, sin)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    for result in (out, expected):
        result.backward(torch.ones_like(result) * torch.arange(8))
    torch.testing.assert_close(mine.grad, exact.grad.to(dtype))


def test_rotation_keeps_lengths_and_relative_angles():
    """The score of two rotated vectors depends on the difference of their positions only."""
    torch.manual_seed(0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)

    def score(m: int, n: int) -> float:
        (a, b) = (rotate(x, (p * frequencies).cos(), (p * frequencies).sin()) for x, p in ((q, m), (k, n)))
        return float(a @ b)

    assert score(3, 1) == pytest.approx(score(103, 101))
    assert score(3, 1) != pytest.approx(score(3, 2))
