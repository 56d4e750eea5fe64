"""The chunked scan against the recurrence, both against transformers; the convolution against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from llmctl.kernels.ssd import causal_conv, ssd_chunked, ssd_reference

B, T, H, P, G, N, K = 2, 37, 4, 3, 2, 5, 4


def operands(seed: int = 0, length: int = T) -> list[torch.Tensor]:
    """x, dt, A, B, C and a first state, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = [
        normal(B, length, H, P),
        F.softplus(normal(B, length, H)),
        -normal(H).exp(),
        normal(B, length, G, N),
        normal(B, length, G, N),
        normal(B, H, P, N),
    ]
    return [x.requires_grad_() for x in made]


def starts(*places: int) -> torch.Tensor:
    """True at these places of the first row, and at others of the second."""
    found = torch.zeros(B, T, dtype=torch.bool)
    found[0, list(places)] = True
    found[1, 9] = True
    return found


CASES = {
    "one document": None,
    "documents": starts(0, 5, 6, 24),
    "a start at a chunk's end": starts(7, 8, 16, 31),
}


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
@pytest.mark.parametrize("case", CASES)
def test_chunked_equals_reference(case, chunk):
    mine, theirs = operands(), operands()
    out = ssd_chunked(*mine, CASES[case], chunk=chunk)
    expected = ssd_reference(*theirs, CASES[case])
    weights = [torch.randn_like(x) for x in expected]
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for results, leaves in ((out, mine), (expected, theirs)):
        total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        total.backward(inputs=leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_single_precision_is_close_to_double():
    x, dt, A, B_, C, state = (t.detach() for t in operands(length=200))
    exact, _ = ssd_reference(x, dt, A, B_, C, state)
    found, last = ssd_chunked(
        x.float(), dt.float(), A.float(), B_.float(), C.float(), state.float(), chunk=64
    )
    assert found.dtype == last.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)


def test_sums_stay_in_single_precision_under_autocast():
    given = [t.detach().float() for t in operands()]
    given[0] = given[0].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, state = ssd_chunked(*given, chunk=8)
    expected, last = ssd_reference(*given)
    assert found.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, last, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_a_long_decay_gives_finite_gradients():
    x, dt, A, B_, C, state = operands()
    y, _ = ssd_chunked(x, dt, A * 2000, B_, C, state, chunk=16)
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, dt, A, B_, C, state))


def test_transformers_computes_the_same():
    x, dt, A, B_, C, state = (t.detach().float() for t in operands())
    expected, last = mamba2_chunk_scan(
        x, dt, A, B_, C, chunk_size=8, initial_states=state, return_final_states=True
    )
    found = ssd_chunked(x, dt, A, B_, C, state, chunk=16)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], last, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_going_on_from_a_state_equals_one_pass(cut):
    x, dt, A, B_, C, state = (t.detach() for t in operands())
    whole, last = ssd_reference(x, dt, A, B_, C, state, CASES["documents"])
    out = []
    for part in (slice(None, cut), slice(cut, None)):
        y, state = ssd_chunked(
            x[:, part], dt[:, part], A, B_[:, part], C[:, part], state, CASES["documents"][:, part], chunk=8
        )
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), whole)
    torch.testing.assert_close(state, last)


def test_padding_leaves_no_trace():
    x, dt, A, B_, C, state = (t.detach() for t in operands())
    dt[:, :6], dt[:, 20:23] = 0, 0
    kept = [t for t in range(T) if t >= 6 and t not in (20, 21, 22)]
    y, last = ssd_chunked(x, dt, A, B_, C, state, chunk=8)
    expected, alone = ssd_reference(x[:, kept], dt[:, kept], A, B_[:, kept], C[:, kept], state)
    torch.testing.assert_close(y[:, kept], expected)
    torch.testing.assert_close(last, alone)


# --- the convolution --------------------------------------------------------------------------------


def convolved(length: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, length, 6), (6, K), (6,))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def test_convolution_equals_torchs():
    x, weight, bias = convolved()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, window = causal_conv(*leaves)
    padded = F.pad(theirs[0].transpose(1, 2), (K - 1, 0))
    expected = F.conv1d(padded, theirs[1][:, None], theirs[2], groups=6).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(window, leaves[0][:, -(K - 1) :])
    upstream = torch.randn_like(y)
    y.backward(upstream), expected.backward(upstream)
    for a, b in zip(leaves, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_convolution_does_not_cross_documents():
    x, weight, bias = convolved()
    y, window = causal_conv(x, weight, bias, torch.randn(B, K - 1, 6).double(), CASES["documents"])
    for first, after in ((0, 5), (5, 6), (6, 24), (24, T)):
        alone, last = causal_conv(x[:1, first:after], weight, bias)
        torch.testing.assert_close(y[:1, first:after], alone)
    torch.testing.assert_close(window[:1], last)


@pytest.mark.parametrize("cut", [1, 2, 25, 36])
def test_convolution_goes_on_from_its_window(cut):
    x, weight, bias = convolved()
    begins = starts(24)
    whole, last = causal_conv(x, weight, bias, starts_BT=begins)
    first, window = causal_conv(x[:, :cut], weight, bias, starts_BT=begins[:, :cut])
    rest = []
    for t in range(cut, T):
        y, window = causal_conv(x[:, t : t + 1], weight, bias, window, begins[:, t : t + 1])
        rest.append(y)
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole)
    torch.testing.assert_close(window, last)


def test_padding_counts_as_zeros():
    x, weight, bias = convolved()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :7] = False
    y, _ = causal_conv(x, weight, bias, mask_BT=mask)
    alone, _ = causal_conv(x[:1, 7:], weight, bias)
    torch.testing.assert_close(y[:1, 7:], alone)
