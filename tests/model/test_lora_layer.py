"""The adapted matrix in one operation: where it is used, and that it computes what PEFT's own layer does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from torch import nn

from llmctl.model import recompute_activations
from llmctl.model.adapters import fold
from llmctl.model.lora_layer import LoraLinear
from tests.model.adapted import TOKENS, adapted, base, ids, inner, logits, shaken

WAYS = pytest.mark.parametrize(
    ("tokens", "recompute"),
    [(None, False), (TOKENS, False), (TOKENS, True)],
    ids=["lora", "tokens", "recomputed"],
)


def unfused(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = lora.Linear
    return model


def trained(
    model: PeftModel, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model.train()(input_ids=ids(), labels=ids(), skip_logits=True, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.requires_grad}


def fused(layer: nn.Module) -> bool:
    """Whether the layer computes in one operation."""
    return layer(torch.randn(2, layer.in_features)).grad_fn.name() == "_LoraLinearBackward"


def layers(model: PeftModel) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


@WAYS
def test_a_step_is_pefts(tokens: list[int] | None, recompute: bool, tmp_path: Path) -> None:
    where = base(tmp_path / "b", attention_bias="all")
    ours, theirs = adapted(where, tokens=tokens), unfused(adapted(where, tokens=tokens))
    assert len(layers(ours)) == 14 and not layers(theirs)
    assert all(fused(layer) for layer in layers(ours.train()))
    if recompute:
        recompute_activations(inner(ours))
    (loss, grads), (expected, expected_grads) = trained(ours), trained(theirs)
    torch.testing.assert_close(loss, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() < 1e-5 * expected_grads[name].norm(), name


@WAYS
def test_a_bfloat16_step_is_as_good_as_pefts(
    tokens: list[int] | None, recompute: bool, tmp_path: Path
) -> None:
    """Both against the step in float32."""
    where = base(tmp_path / "b", attention_bias="all")
    ours, theirs = adapted(where, tokens=tokens), unfused(adapted(where, tokens=tokens))
    if recompute:
        recompute_activations(inner(ours))
    exact_loss, exact = trained(adapted(where, tokens=tokens))
    errors = []
    for model in (ours, theirs):
        loss, grads = trained(model, torch.bfloat16)
        assert loss == pytest.approx(float(exact_loss), rel=0.02)
        errors.append(sum(float((grads[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact))
    assert 0 < errors[0] < 1.2 * errors[1] < 0.2


def test_anything_but_the_plain_case_is_left_to_peft(tmp_path: Path) -> None:
    where = base(tmp_path / "b")
    layer = layers(adapted(where).train())[0]
    assert fused(layer)
    assert not fused(layer.eval())
    assert not fused(layers(adapted(where, dropout=0.1).train())[0])


def test_an_adapter_can_be_switched_off(tmp_path: Path) -> None:
    """As DPO does with the reference."""
    model = adapted(base(tmp_path / "b"), tokens=TOKENS).train()
    with torch.no_grad():
        on = model(input_ids=ids(), labels=ids(), skip_logits=True).loss
        with model.disable_adapter():
            off = model(input_ids=ids(), labels=ids(), skip_logits=True).loss
            whole = model(input_ids=ids(), labels=ids()).loss
    shaken(model, seed=9)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids(), labels=ids(), skip_logits=True).loss, off)
    assert (on - off).abs() > 0.01
    torch.testing.assert_close(off, whole)


def test_nothing_of_it_is_left_after_folding(tmp_path: Path) -> None:
    model = adapted(base(tmp_path / "b"), tokens=TOKENS).train()
    expected = logits(model)
    folded = fold(model.train())
    assert not any(isinstance(module, lora.LoraLayer) for module in folded.modules())
    torch.testing.assert_close(logits(folded), expected, atol=1e-4, rtol=1e-4)
    loss = folded(input_ids=ids(), labels=ids(), skip_logits=True).loss
    torch.testing.assert_close(loss, folded(input_ids=ids(), labels=ids()).loss)
