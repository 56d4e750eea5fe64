"""Every attention path against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.attention import PATHS, Scores, Visibility, attend
from llmctl.kernels.blocks import block_layout
from llmctl.kernels.reference import attend_reference

B, H, T, D = 3, 4, 21, 8


def operands(groups: int, queries: int = T) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((B, H, queries, D), (B, groups, T, D), (B, groups, T, D))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def documents() -> tuple[tuple[int, ...], torch.Tensor]:
    spans = (5, 16, 21, 1, 13, 7)  # rows of 21: 5+16, 21, 1+13+7
    segment = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(spans)).view(B, T)
    return spans, (segment[:, :, None] == segment[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()


def case(path: str) -> tuple[Visibility, torch.Tensor, int]:
    """The path's visibility, the same as a mask [B, T, S], and the number of queries."""
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    spans, isolated = documents()
    random = torch.rand(B, T, T, generator=torch.Generator().manual_seed(1)) < 0.4
    random |= torch.eye(T, dtype=torch.bool)
    near = block_layout(torch.arange(T)[None], None, lambda q, k: q - k < 4, 3, block=4, causal=True)
    return {
        "open": (Visibility("open"), torch.ones(B, 1, T, dtype=torch.bool), 1),
        "causal": (Visibility("causal"), causal, T),
        "spans": (Visibility("spans", spans=spans), isolated, T),
        "dense": (Visibility("dense", mask=random[:, None]), random, T),
        "blocks": (Visibility("blocks", layout=near), near.dense(T).expand(B, -1, -1), T),
    }[path]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("path", PATHS)
def test_path_equals_reference(path, groups):
    visible, mask, queries = case(path)
    mine, reference = operands(groups, queries), operands(groups, queries)
    out, expected = attend(*mine, visible), attend_reference(*reference, mask)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(out)
    (out * weights).sum().backward(), (expected * weights).sum().backward()
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=1e-4)


def test_cpu_attends_in_float32_under_autocast():
    q, k, v = (x.detach() for x in operands(2))
    visible, mask, _ = case("causal")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k.bfloat16(), v.bfloat16(), visible)
    assert out.dtype == torch.float32
    expected = attend_reference(q, k.bfloat16().float(), v.bfloat16().float(), mask)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_scale_cap_and_dropout_on_every_path(path):
    """A soft cap bends the scores as its formula says; dropout leaves the mean, and a cap of nothing is no cap."""
    visible, mask, queries = case(path)
    q, k, v = (x.detach() for x in operands(2, queries))
    out = attend(q, k, v, visible, Scores(scale=0.7, softcap=1.5))
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = 1.5 * torch.tanh(0.7 * q @ keys.transpose(-1, -2) / 1.5)
    expected = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    plain = attend(q, k, v, visible, Scores(scale=0.7))
    torch.testing.assert_close(
        attend(q, k, v, visible, Scores(0.7, softcap=1e6)), plain, atol=1e-4, rtol=1e-4
    )
    torch.manual_seed(0)
    dropped = torch.stack([attend(q, k, v, visible, Scores(0.7, dropout=0.3)) for _ in range(600)])
    assert not torch.equal(dropped[0], plain)
    # 600 draws: the mean is within five of its standard errors
    error = dropped.std(0) / 600**0.5
    assert bool(((dropped.mean(0) - plain).abs() <= 5 * error + 1e-6).all())


def test_a_bias_is_added_to_the_scores():
    q, k, v = (x.detach() for x in operands(2))
    bias = torch.randn(1, H, T, T)
    out = attend(q, k, v, Visibility("dense", mask=bias))
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = (q @ keys.transpose(-1, -2) / D**0.5 + bias).softmax(-1) @ values
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
