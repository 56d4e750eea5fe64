"""The sliced head-and-loss against all logits at once."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels import cross_entropy
from llmctl.kernels.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference

N, E, V = 37, 16, 50


def operands(ignored: float = 0.3):
    torch.manual_seed(0)
    labels = torch.randint(0, V, (N,))
    labels[torch.rand(N) < ignored] = IGNORE
    return torch.randn(N, E, requires_grad=True), torch.randn(V, E, requires_grad=True), labels


@pytest.mark.parametrize("size", [1, 8, 1024])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_equals_reference(monkeypatch, size, upstream):
    monkeypatch.setitem(cross_entropy.SLICE, "cpu", size)
    (h1, w1, labels), (h2, w2, _) = operands(), operands()
    mine, expected = linear_cross_entropy(h1, w1, labels), linear_cross_entropy_reference(h2, w2, labels)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-6)
    (mine * upstream).backward(), (expected * upstream).backward()
    torch.testing.assert_close(h1.grad, h2.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(w1.grad, w2.grad, atol=1e-5, rtol=1e-5)
    assert not h1.grad[labels == IGNORE].any()


def test_gradients_against_finite_differences():
    h, w, labels = operands()
    h, w = h.detach().double()[:5].requires_grad_(), w.detach().double().requires_grad_()
    # sums are float32 inside, so the differences need a wide step
    assert torch.autograd.gradcheck(
        lambda a, b: linear_cross_entropy(a, b, labels[:5]).double(), (h, w), eps=1e-2, atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_frozen_parts_get_no_gradient(frozen):
    h, w, labels = operands()
    h.requires_grad_(frozen == "head"), w.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(h, w, labels)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (h.grad is not None) == (frozen == "head") and (w.grad is not None) == (frozen == "hidden")


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    h, w, labels = operands()
    asked = []
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda self, *rest: asked.append(self) or self)
    with torch.no_grad():
        loss = linear_cross_entropy(h, w, labels)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(h, w, labels).detach())
    assert not asked
    linear_cross_entropy(h, w, labels)
    assert asked


def test_all_ignored_is_zero_with_zero_gradients():
    h, w, labels = operands(ignored=2)
    loss = linear_cross_entropy(h, w, labels)
    loss.backward()
    assert loss == 0 and not h.grad.any() and not w.grad.any()


def test_autocast_computes_in_bfloat16_and_sums_in_float32():
    h, w, labels = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, w, labels)
    exact = linear_cross_entropy_reference(h, w, labels)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [8, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_place_of_the_heads(monkeypatch, size, dtype):
    """Loss and gradients as with the rows copied into the head; the head itself stays as it is."""
    monkeypatch.setitem(cross_entropy.SLICE, "cpu", size)
    index = torch.tensor([7, 2, 49])
    found = []
    for by_rows in (True, False):
        h, w, labels = operands()
        labels[:3] = index
        w.requires_grad_(False)
        before = w.clone()
        values = torch.randn(3, E, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if by_rows:
                loss = linear_cross_entropy(h, w, labels, (index, values))
            else:
                loss = linear_cross_entropy(h, w.index_copy(0, index, values), labels)
        (loss * -2.5).backward()
        assert torch.equal(w, before) and w.grad is None and values.grad.any()
        found.append((loss, h.grad, values.grad))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_rows_without_gradients():
    h, w, labels = operands()
    index, values = torch.tensor([1]), torch.randn(1, E, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(h, w, labels, (index, values))
    assert not loss.requires_grad
    expected = linear_cross_entropy_reference(h, w.index_copy(0, index, values), labels)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-4, rtol=1e-6)
