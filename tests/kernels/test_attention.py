"""Every attention path against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.attention import PATHS, Visibility, attend, attend_reference

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
    return {
        "open": (Visibility("open"), torch.ones(B, 1, T, dtype=torch.bool), 1),
        "causal": (Visibility("causal"), causal, T),
        "spans": (Visibility("spans", spans=spans), isolated, T),
        "dense": (Visibility("dense", mask=random[:, None]), random, T),
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
