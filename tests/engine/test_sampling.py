"""Sampling: filters against their definitions, draws against their probabilities."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from llmctl.engine.sampling import sampler, temperature, top_k, top_p

LOGITS = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("k", [1, 5, 39, 40, 100])
def test_top_k_equals_transformers(k):
    assert torch.equal(top_k(LOGITS, k), TopKLogitsWarper(min(k, 40))(None, LOGITS))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(p):
    assert torch.equal(top_p(LOGITS, p), TopPLogitsWarper(p)(None, LOGITS))


def test_temperature_divides():
    assert torch.equal(temperature(LOGITS, 0.5), LOGITS * 2)


def test_zero_is_greedy_whatever_else_is_set():
    assert torch.equal(sampler(0, 3, 0.5, 7)(LOGITS), LOGITS.argmax(-1))


def test_a_seed_repeats_and_another_differs():
    draw = [[sampler(1.0, None, 1.0, seed)(LOGITS).tolist() for _ in range(1)] for seed in (1, 1, 2)]
    first, again, other = [sampler(1.5, None, 1.0, s)(LOGITS.repeat(20, 1)) for s in (1, 1, 2)]
    assert draw[0] == draw[1]
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("heat", "k", "p"), [(1.0, None, 1.0), (0.7, 5, 1.0), (1.3, None, 0.8), (1.0, 6, 0.9)]
)
def test_draws_follow_the_filtered_probabilities(heat, k, p):
    logits, draw, count = LOGITS[:1], sampler(heat, k, p, 0), 20_000
    drawn = draw(logits.expand(count, -1)).bincount(minlength=40) / count
    expected = temperature(logits, heat)
    expected = top_k(expected, k) if k else expected
    expected = top_p(expected, p).softmax(-1)[0]
    assert (drawn - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert not drawn[expected == 0].any()
