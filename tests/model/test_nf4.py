"""Four-bit bases: what is rounded, that adapters train on them, and that they reopen as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.model.adapters import add_lora, attach
from llmctl.model.checkpoint import load_model
from llmctl.model.leaves import leaves
from llmctl.model.nf4 import BLOCK, quantize_nf4, round_nf4
from tests.model.adapted import base, ids, inner, logits, saved, shaken

# the sixteen values NF4 has, as Dettmers et al. 2023 (arXiv:2305.14314), appendix E, print them
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def nearest_levels(weight: torch.Tensor) -> torch.Tensor:
    """The definition, with scales in full precision: 64 weights of a row over their largest, to the nearest level."""
    levels = torch.tensor(LEVELS)
    parts = []
    for part in weight.split(BLOCK, dim=1):
        scale = part.abs().amax(1, keepdim=True)
        nearest = ((part / scale)[..., None] - levels).abs().argmin(-1)
        parts.append(levels[nearest] * scale)
    return torch.cat(parts, dim=1)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A base wide enough for several blocks in a row, with biases."""
    return base(tmp_path / "b", hidden_size=64, intermediate_size=96, attention_bias="all", head_dim=24)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm())


def test_the_leaves_are_in_four_bits_and_the_head_is_not(where: Path) -> None:
    plain, model = load_model(where), load_model(where)
    quantize_nf4(model, torch.float32)
    kinds = {leaf.name: (leaf.kind, type(leaf.module), leaf.module.weight.dtype) for leaf in leaves(model)}
    assert kinds.pop("lm_head") == ("head", nn.Linear, torch.float32)
    assert len(kinds) == 14
    assert set(kinds.values()) == {("linear", bnb.nn.Linear4bit, torch.uint8)}
    assert [leaf.shape for leaf in leaves(model)] == [leaf.shape for leaf in leaves(plain)]
    for leaf in leaves(model):
        whole = plain.get_submodule(leaf.name)
        if leaf.kind == "linear":
            rows, columns = whole.weight.shape
            assert leaf.module.weight.numel() == rows * -(-columns // BLOCK) * BLOCK // 2
            assert leaf.module.weight.quant_state.nested  # the scales are quantized as well
        assert (leaf.module.bias is None) is (whole.bias is None)
        assert leaf.module.bias is None or torch.equal(leaf.module.bias, whole.bias)


def test_memory_is_an_eighth_of_float32(tmp_path: Path) -> None:
    def size(model: nn.Module) -> int:
        return sum(
            leaf.module.weight.numel() * leaf.module.weight.element_size()
            for leaf in leaves(model)
            if leaf.kind == "linear"
        )

    model = load_model(base(tmp_path / "b", hidden_size=64, intermediate_size=128))
    whole = size(model)
    quantize_nf4(model, torch.float32)
    assert size(model) * 8 == whole


def test_rounding_is_to_the_nearest_level(where: Path) -> None:
    """Only the scales, which are rounded too, make a difference to the definition."""
    plain, model = load_model(where), load_model(where)
    round_nf4(model)
    for leaf in leaves(model):
        whole = plain.get_submodule(leaf.name).weight.detach()
        if leaf.kind == "head":
            assert torch.equal(leaf.module.weight, whole)
            continue
        assert relative(leaf.module.weight, nearest_levels(whole)) < 0.01
        assert 0.05 < relative(leaf.module.weight, whole) < 0.12
        assert len(leaf.module.weight.unique()) < len(whole.unique()) / 2


def test_rounded_weights_are_what_four_bits_compute_with(where: Path) -> None:
    rounded, packed = load_model(where), load_model(where)
    round_nf4(rounded)
    quantize_nf4(packed, torch.float32)
    torch.testing.assert_close(logits(packed), logits(rounded), atol=1e-5, rtol=1e-5)
    assert relative(logits(packed), logits(load_model(where))) > 0.02


def test_rounding_again_changes_little(where: Path) -> None:
    """A model rounded before may be a base again."""
    once, twice = load_model(where), load_model(where)
    round_nf4(once)
    round_nf4(twice)
    round_nf4(twice)
    assert relative(logits(twice), logits(once)) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_trains_on_it_and_reopens_with_the_logits_it_had(
    dtype: torch.dtype, where: Path, tmp_path: Path
) -> None:
    """On the rounded base in float32, with a relative error of 1e-5; of 2e-2 if it was trained in bfloat16."""
    model = load_model(where)
    quantize_nf4(model, dtype)
    peft = add_lora(model, r=4, alpha=8, dropout=0.0, target_modules="all-linear", base=str(where))
    assert all(w.requires_grad is (".lora_" in name) for name, w in peft.named_parameters())
    optimizer = torch.optim.AdamW([w for w in peft.parameters() if w.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = peft(input_ids=ids(), labels=ids(), skip_logits=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        before = logits(peft).float()
    folder = saved(peft, tmp_path / "a")

    opened = load_model(where)
    round_nf4(opened)
    found = logits(attach(opened, folder))
    assert relative(found, before) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert relative(logits(attach(load_model(where), folder)), before) > 0.02  # the rounding matters
    assert isinstance(inner(peft).lm_head, nn.Linear)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 12, "intermediate_size": 20}, {"intermediate_size": 33}], ids=str
)
def test_rows_that_are_no_whole_blocks(fields: dict[str, int], tmp_path: Path) -> None:
    odd = base(tmp_path / "odd", **fields)
    rounded, packed = load_model(odd), load_model(odd)
    round_nf4(rounded)
    quantize_nf4(packed, torch.float32)
    for leaf in leaves(rounded):
        whole = load_model(odd).get_submodule(leaf.name).weight.detach()
        if leaf.kind == "linear":
            assert leaf.module.weight.is_contiguous()
            assert relative(leaf.module.weight, nearest_levels(whole)) < 0.01
    torch.testing.assert_close(logits(packed), logits(rounded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"intermediate_size": 33}], ids=str)
def test_gradients_after_an_evaluation(fields: dict[str, int], tmp_path: Path) -> None:
    """They go through the base to the first layer, as on the rounded model, before and after."""
    where = base(tmp_path / "b", hidden_size=64, **fields)
    rounded, packed = load_model(where), load_model(where)
    round_nf4(rounded)
    quantize_nf4(packed, torch.float32)
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "base": str(where)}
    models = [add_lora(model, **lora) for model in (rounded, packed)]
    for model in models:
        shaken(model)
    for _ in range(2):
        for model in models:
            model.train().zero_grad()
            model(input_ids=ids(), labels=ids(), skip_logits=True, use_cache=False).loss.backward()
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            if a.requires_grad:
                torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)
        torch.testing.assert_close(*(logits(model) for model in models), atol=1e-5, rtol=1e-5)


def test_without_bitsandbytes(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as caught:
        quantize_nf4(load_model(where), torch.float32)
    assert caught.value.message.startswith("four-bit bases need bitsandbytes, which cannot be imported (")
    assert caught.value.hint == "pip install bitsandbytes, or train with --lora"
