"""A matrix with its adapter in one operation against the definition, and autograd through it."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.lora import lora_linear, lora_linear_reference

I, O, R, SCALE = 12, 20, 3, 1.7  # noqa: E741


def operands(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[torch.Tensor | None]:
    """x, W, bias, A, B; W and bias are frozen."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 5, I), (O, I), (O,), (R, I), (O, R)]
    x, w, b, *adapter = (torch.randn(shape, generator=random, dtype=dtype) for shape in shapes)
    return [x.requires_grad_(), w, b if bias else None, *(part.requires_grad_() for part in adapter)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_equals_reference(bias, upstream):
    found = []
    for function in (lora_linear, lora_linear_reference):
        given = operands(bias=bias)
        out = function(*given, SCALE)
        (out * upstream * torch.arange(O)).sum().backward()
        found.append([out, *(part.grad for part in (given[0], *given[3:]))])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-5)


def test_gradients_against_finite_differences():
    assert torch.autograd.gradcheck(lambda *given: lora_linear(*given, SCALE), operands(torch.float64))


def test_under_autocast():
    """In bfloat16, as near to the exact result as torch's own operations are; gradients have the weights' dtype."""
    exact = operands(torch.float64)
    expected = lora_linear_reference(*exact, SCALE)
    expected.sum().backward()
    errors = {}
    for function in (lora_linear, lora_linear_reference):
        given = operands(torch.float64)
        given = [part.detach().float().requires_grad_(part.requires_grad) for part in given]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(*given, SCALE)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert all(given[place].grad.dtype == torch.float32 for place in (0, 3, 4))
        pairs = [(out, expected), *((given[place].grad, exact[place].grad) for place in (0, 3, 4))]
        errors[function] = [
            float((mine - right).detach().norm() / right.detach().norm()) for mine, right in pairs
        ]
    for mine, theirs in zip(*errors.values(), strict=True):
        assert 0 < mine < max(0.01, 1.2 * theirs)


def test_what_is_not_asked_for_gets_no_gradient():
    given = operands()
    given[0].requires_grad_(False)
    lora_linear(*given, SCALE).sum().backward()
    assert given[0].grad is None and given[3].grad.any() and given[4].grad.any()
