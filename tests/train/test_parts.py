"""Schedule, optimizer and loss by themselves."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from llmctl.model.checkpoint import new_model
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import TrainSection
from llmctl.recipe.train import Schedule
from llmctl.train.optimizer import make_optimizer
from llmctl.train.schedule import SCHEDULES, learning_rate

SPEC = ModelSection(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
STEPS, WARMUP, PEAK, FLOOR = 200, 0.1, 3e-3, 0.1


def rate(step: int, kind: str = "cosine") -> float:
    return learning_rate(step, STEPS, peak=PEAK, kind=kind, warmup_ratio=WARMUP, min_ratio=FLOOR)


def test_schedules_are_those_the_recipe_names():
    assert set(SCHEDULES) == set(get_args(Schedule))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedule_warms_up_peaks_and_ends(kind):
    values = [rate(step, kind) for step in range(STEPS)]
    assert values[0] == pytest.approx(PEAK / 20) and values[19] == pytest.approx(PEAK)
    assert max(values) == pytest.approx(PEAK)
    assert values[-1] == pytest.approx(PEAK if kind == "constant" else PEAK * FLOOR)
    after = values[20:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


def test_cosine_follows_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 20, STEPS, min_lr_rate=FLOOR)
    for step in range(20, STEPS):
        while theirs.last_epoch < step:
            optimizer.step()
            theirs.step()
        # ours reaches the floor at the last step that is taken, theirs one step later
        assert rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=PEAK * 0.01)


def test_one_step_run_has_a_rate():
    assert learning_rate(0, 1, peak=1.0, kind="cosine", warmup_ratio=0.0, min_ratio=0.0) == 1.0


def test_only_matrices_decay():
    model = new_model(SPEC, seed=0)
    optimizer = make_optimizer(model, TrainSection(weight_decay=0.3))
    decay = {id(w): group["weight_decay"] for group in optimizer.param_groups for w in group["params"]}
    for name, weight in model.named_parameters():
        assert decay.pop(id(weight)) == (0.0 if name.endswith("norm.weight") else 0.3), name
    assert not decay


def test_fused_step_equals_the_plain_definition():
    """AdamW by hand in float64, three steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False)
    settings = TrainSection(learning_rate=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(layer, settings)
    w = layer.weight.detach().double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 4):
        grad = torch.randn(3, 4)
        layer.weight.grad = grad.clone()
        optimizer.step()
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 1e-2 * 0.1)
        w = w - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(layer.weight.double(), w, atol=1e-6, rtol=1e-5)


def test_nothing_trainable_is_a_programmers_error():
    layer = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(layer, TrainSection())


def test_initial_loss_is_that_of_a_uniform_guess():
    model = new_model(SPEC, seed=0)
    x = torch.randint(0, 31, (4, 50))
    assert float(model(x, labels=x).loss) == pytest.approx(math.log(31), rel=0.02)
