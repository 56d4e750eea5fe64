"""Sorted bucket attention against the dense definition, values and gradients, and the definition against a plain loop."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from llmctl.kernels import buckets as kernel
from llmctl.kernels.buckets import Buckets, attend_buckets, attend_buckets_reference

B, H, T, D = 2, 4, 45, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 4)


def operands(groups: int, queries: int = T) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((B, H, queries, D), (B, groups, T, D), (B, groups, T, D))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def made(rounds: int, documents: bool, causal: bool, others_first: bool = False, chunk: int = 5) -> Buckets:
    """Buckets of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 7, (B, H, rounds, T), generator=generator) * 2 // 5
    segment = None
    if documents:
        lengths = ((20, 1, 24), (0, 44, 1))
        segment = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    return Buckets(index, segment, chunk, causal, others_first)


def looped(buckets: Buckets, row: int, head: int) -> torch.Tensor:
    """What the docstring says, pair by pair: [T, T]."""
    seen = torch.zeros(T, T, dtype=torch.bool)
    segment = [0] * T if buckets.segment is None else buckets.segment[row].tolist()
    for index in buckets.index[row, head].tolist():
        names = list(zip(segment, index, strict=True))
        chunk = [names[:t].count(names[t]) // buckets.chunk for t in range(T)]
        for t, s in itertools.product(range(T), range(T)):
            near = chunk[t] - chunk[s] in ((0, 1) if buckets.causal else (-1, 0, 1))
            seen[t, s] |= names[t] == names[s] and near and (s <= t or not buckets.causal)
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_mask_is_the_definition(documents, causal):
    buckets = made(2, documents, causal)
    mask = buckets.mask(T)
    for row, head in ((0, 0), (1, 3)):
        assert torch.equal(mask[row, head], looped(buckets, row, head))


CASES = {
    "one round": {"rounds": 1, "documents": False},
    "documents": {"rounds": 1, "documents": True},
    "others first": {"rounds": 1, "documents": True, "others_first": True},
    "three rounds": {"rounds": 3, "documents": False},
    "three rounds, documents, others first": {"rounds": 3, "documents": True, "others_first": True},
    "a chunk of one": {"rounds": 2, "documents": False, "chunk": 1},
    "a chunk for all": {"rounds": 2, "documents": True, "chunk": 64},
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_sorted_equals_reference(case, causal, groups):
    buckets = made(causal=causal, **CASES[case])
    mine, theirs = operands(groups), operands(groups)
    out = attend_buckets(*mine, buckets, scale=0.3)
    expected = attend_buckets_reference(*theirs, buckets, scale=0.3)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream), expected.backward(upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("rounds", [1, 2])
def test_usual_tiles_and_single_precision(rounds, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 64)
    buckets = made(rounds, True, True, others_first=True)
    q, k, v = (x.detach().float().requires_grad_() for x in operands(2))
    out = attend_buckets(q, k, v, buckets)
    torch.testing.assert_close(out, attend_buckets_reference(q, k, v, buckets), atol=2e-6, rtol=1e-5)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_token_alone_attends_to_itself():
    alone = Buckets(torch.arange(T).expand(B, H, 2, T), None, 4, True, others_first=True)
    q, k, v = (x.detach().float() for x in operands(H))
    torch.testing.assert_close(attend_buckets(q, k, v, alone), v)


def test_others_come_first():
    together = made(1, False, True, others_first=True)
    q, k, v = (x.detach() for x in operands(H))
    seen = together.mask(T) & ~torch.eye(T, dtype=torch.bool)
    accompanied = seen.any(-1)
    changed = attend_buckets(q, k, v * 1.0, together)
    scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(~seen, -torch.inf)
    expected = scores[accompanied].softmax(-1)
    values = v[:, :, None].expand(B, H, T, T, D)[accompanied]
    torch.testing.assert_close(changed[accompanied], (expected[:, None] @ values).squeeze(1))


@pytest.mark.parametrize("rounds", [1, 2])
def test_later_tokens_change_nothing(rounds):
    buckets = made(rounds, False, True)
    whole = attend_buckets(*operands(2), buckets)
    short = dataclasses.replace(buckets, index=buckets.index[..., :30])
    part = attend_buckets(*(x[:, :, :30] for x in operands(2)), short)
    torch.testing.assert_close(part, whole[:, :, :30])


@pytest.mark.parametrize("queries", [1, 7])
def test_decoding_sees_what_the_whole_pass_saw(queries):
    buckets = made(2, True, True, others_first=True)
    q, k, v = operands(2)
    whole = attend_buckets(q, k, v, buckets)
    last = attend_buckets_reference(q[:, :, -queries:], k, v, buckets)
    torch.testing.assert_close(last, whole[:, :, -queries:])


def test_rounds_may_be_left_out_of_the_shape():
    buckets = made(1, True, True)
    flat = dataclasses.replace(buckets, index=buckets.index[:, :, 0])
    torch.testing.assert_close(attend_buckets(*operands(2), flat), attend_buckets(*operands(2), buckets))


@pytest.mark.parametrize("attention", [attend_buckets, attend_buckets_reference])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_cpu_attends_in_single_precision_under_autocast(rounds, attention):
    buckets = made(rounds, True, True)
    q, k, v = (x.detach().float() for x in operands(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, buckets)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, attend_buckets_reference(q, k, v, buckets), atol=2e-6, rtol=1e-5)
