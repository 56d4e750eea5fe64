"""GPTQ of a whole model: what each leaf is calibrated on, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmctl.data.batches import Batch, Laid, eval_batches
from llmctl.data.packing import cut, pack, unpacked
from llmctl.errors import UserError
from llmctl.kernels.quantized import Quantized
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.checkpoint import new_model
from llmctl.quantize import calibrate
from llmctl.quantize.absmax import absmax
from llmctl.quantize.calibrate import quantize_blocks
from llmctl.quantize.gptq import Gptq, gptq
from tests.model.adapted import ROWS, spec

SETTINGS = Gptq(bits=4, group=16)
LENGTHS = [20, 3, 9, 16, 2, 12, 31, 7, 18]
# the leaves of a block in the order it calls them; those on a line read the same tensor
CALLS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def fresh(**fields: Any) -> LlmctlForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return new_model(spec(**{**sizes, "attention_bias": "all", **fields}), seed=0)


def laid(packed: bool = False) -> Laid:
    """Documents of `LENGTHS` random tokens."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    pieces = cut(starts, 32, "split")
    rows = pack(pieces.length, 32) if packed else unpacked(len(pieces))
    return Laid(np.random.default_rng(0).integers(0, ROWS, starts[-1]), pieces, rows)


def text(batch_size: int = 4, packed: bool = False) -> list[Batch]:
    return list(eval_batches(laid(packed), batch_size=batch_size, pad_id=0))


def names(model: LlmctlForCausalLM) -> list[str]:
    """Every leaf but the head, in the order of the calls."""
    return [
        f"model.layers.{number}.{name}"
        for number in range(len(model.model.layers))
        for group in CALLS
        for name in group
    ]


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The Hessians that the driver hands to `gptq`, one a leaf."""
    found: list[Tensor] = []

    def watched(weight: Tensor, hessian: Tensor, settings: Gptq) -> Quantized:
        found.append(hessian.clone())
        return plain(weight, hessian, settings)

    plain = calibrate.gptq
    monkeypatch.setattr(calibrate, "gptq", watched)
    return found


@torch.no_grad()
def inputs_of(model: LlmctlForCausalLM, name: str, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """What a leaf reads in plain forward passes over one document at a time, [N, I]."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, 1)))
    for batch in batches:
        model.eval()(batch["input_ids"])
    hook.remove()
    return torch.cat(found)


def test_every_leaf_but_the_head_takes_in_what_its_codes_stand_for() -> None:
    model, before = fresh(), fresh()
    told: list[tuple[str, Mapping[str, float]]] = []
    found = quantize_blocks(model, text(), SETTINGS, lambda *said: told.append(said))
    assert list(found) == [name for name, _ in told] == names(model)
    assert set(found) == {leaf.name for leaf in leaves(model) if leaf.kind == "linear"}
    for name, weight in model.named_parameters():
        leaf = name.removesuffix(".weight")
        if leaf in found:
            assert torch.equal(weight, found[leaf].dequantize())
            assert not torch.equal(weight, before.get_parameter(name))
            assert found[leaf].scale.shape[1] == weight.shape[1] // 16
        else:
            assert torch.equal(weight, before.get_parameter(name)), name
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("settings", [SETTINGS, Gptq(3, None, False, False)], ids=str)
def test_each_leaf_is_calibrated_with_all_before_it_quantized(settings: Gptq, hessians: list[Tensor]) -> None:
    """In the quantized model every leaf reads what it was calibrated on."""
    model = fresh()
    found = quantize_blocks(model, text(), settings)
    alone = text(batch_size=1)
    whole = fresh()
    for name, hessian in zip(found, hessians, strict=True):
        x = inputs_of(model, name, alone)
        assert len(x) == sum(LENGTHS)
        torch.testing.assert_close(hessian, 2 / len(x) * x.T @ x, atol=1e-5, rtol=1e-4)
        first = name in names(model)[:3]
        y = inputs_of(whole, name, alone)
        assert torch.allclose(hessian, 2 / len(y) * y.T @ y, atol=1e-5, rtol=1e-3) is first


def test_leaves_that_read_the_same_share_a_hessian(hessians: list[Tensor]) -> None:
    quantize_blocks(fresh(), text(), SETTINGS)
    same = [torch.equal(a, b) for a, b in pairwise(hessians) if a.shape == b.shape]
    # q = k = v, v ≠ o, o ≠ gate, gate = up; down is of another shape
    assert same == [True, True, False, False, True] * 2


@pytest.mark.parametrize(("batch_size", "packed"), [(4, False), (9, False), (2, True), (1, True)])
def test_padding_and_packing_change_nothing(batch_size: int, packed: bool, hessians: list[Tensor]) -> None:
    """Neither of them does to the Hessians, so the codes are the same too."""
    first, second = fresh(), fresh()
    alone = quantize_blocks(first, text(batch_size=1), SETTINGS)
    expected, hessians[:] = list(hessians), []
    batches = text(batch_size, packed)
    assert (batch_size == 1) or any(not b["attention_mask"].all() for b in batches)
    together = quantize_blocks(second, batches, SETTINGS)
    for a, b in zip(expected, hessians, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    for name, codes in alone.items():
        assert (codes.codes == together[name].codes).float().mean() > 0.99


def test_the_model_stays_closer_than_rounded_to_nearest() -> None:
    """On text of the same kind that was not calibrated on."""
    model, nearest, whole = fresh(), fresh(), fresh()
    told: dict[str, Mapping[str, float]] = {}
    random = torch.Generator().manual_seed(5)
    rows = torch.randint(0, ROWS, (96, 32), generator=random)
    calibration = [
        {
            "input_ids": part,
            "position_ids": torch.arange(32).expand(len(part), -1),
            "attention_mask": torch.ones_like(part),
        }
        for part in rows[:64].split(8)
    ]
    settings = Gptq(bits=3, group=16)
    quantize_blocks(model, calibration, settings, told.__setitem__)
    for leaf in leaves(nearest):
        if leaf.kind == "linear":
            leaf.module.weight.data.copy_(absmax(leaf.module.weight, 3, 16).dequantize())
    with torch.no_grad():
        expected, found, rounded = (m.eval()(rows[64:]).logits for m in (whole, model, nearest))
    assert (found - expected).norm() < 0.8 * (rounded - expected).norm()
    assert all(figures["error"] < figures["nearest_error"] for figures in told.values())
    assert {figures["tokens"] for figures in told.values()} == {64 * 32}


def test_what_is_told_is_the_error_on_the_text() -> None:
    model, whole = fresh(), fresh()
    told: dict[str, Mapping[str, float]] = {}
    found = quantize_blocks(model, text(), SETTINGS, told.__setitem__)
    for name, codes in found.items():
        x, weight = inputs_of(model, name, text(batch_size=1)), whole.get_submodule(name).weight.detach()
        sides = {"error": codes.dequantize(), "nearest_error": absmax(weight, 4, 16).dequantize()}
        for figure, other in sides.items():
            expected = (x @ (weight - other).T).norm() ** 2 / (x @ weight.T).norm() ** 2
            assert told[name][figure] == pytest.approx(float(expected), rel=1e-2)


def test_a_leaf_that_no_groups_fit_is_left_alone() -> None:
    model, before = fresh(intermediate_size=40), fresh(intermediate_size=40)
    found = quantize_blocks(model, text(), SETTINGS)
    left = {leaf.name for leaf in leaves(model) if leaf.kind == "linear"} - set(found)
    assert left == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    for name in left:
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)


def test_a_model_in_bfloat16() -> None:
    model = fresh().to(torch.bfloat16)
    found = quantize_blocks(model, text(), SETTINGS)
    assert list(found) == names(model)
    for name, codes in found.items():
        assert torch.equal(model.get_submodule(name).weight, codes.dequantize().bfloat16())


LARGE = "the checkpoint is broken, or its numbers are too large even for float32"
# what is spoiled -> (its new value, the message)
SPOILED = {
    "model.layers.1.mlp.up_proj.weight": (
        3e38,
        "model.layers.1.mlp.down_proj: its inputs on the calibration text, or their squares, are not finite",
    ),
    "model.layers.0.self_attn.v_proj.weight": (
        torch.nan,
        "model.layers.0.self_attn.v_proj: its weight is not finite",
    ),
    "model.layers.1.mlp.down_proj.bias": (
        torch.inf,
        "model.layers.1: its outputs on the calibration text are not finite",
    ),
    "model.embed_tokens.weight": (
        torch.nan,
        "model.embed_tokens: its outputs on the calibration text are not finite",
    ),
    "model.layers.1.input_layernorm.weight": (
        torch.nan,
        "model.layers.1.self_attn.q_proj: its inputs on the calibration text, or their squares, are not finite",
    ),
}


@pytest.mark.parametrize("where", SPOILED)
def test_numbers_that_are_not_finite_are_found_where_they_begin(where: str) -> None:
    model = fresh(mlp_bias=True)
    value, message = SPOILED[where]
    with torch.no_grad():
        model.get_parameter(where).fill_(value)
    with pytest.raises(UserError) as caught:
        quantize_blocks(model, text(), SETTINGS)
    assert (caught.value.message, caught.value.hint) == (message, LARGE)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["plain", "experts", "soft experts"])
def test_padding_may_be_anything(kind: str) -> None:
    """A padding token whose row of the embedding is broken harms nobody."""
    model = fresh(tied=False, **KINDS.get(kind, {}))
    batches = list(eval_batches(laid(), batch_size=9, pad_id=ROWS - 1))
    for batch in batches:
        real = batch["attention_mask"] == 1
        batch["input_ids"][real & (batch["input_ids"] == ROWS - 1)] = 0
    model.model.embed_tokens.weight.data[ROWS - 1] = torch.nan
    wanted = {leaf.name for leaf in leaves(model) if leaf.kind == "linear"}
    assert set(quantize_blocks(model, batches, SETTINGS)) == wanted


def test_a_hessian_that_cannot_be_factored_names_its_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.quantize.gptq.MOST_DAMPING", 1e-9)
    with pytest.raises(UserError) as caught:
        quantize_blocks(fresh(), text(), SETTINGS)
    assert caught.value.message == (
        "model.layers.0.self_attn.q_proj: the Hessian of its inputs is not positive definite with 1e-09 times the "
        "mean added to its diagonal"
    )
    assert caught.value.hint == "give more calibration text"


def test_no_text() -> None:
    with pytest.raises(ValueError, match="no calibration text"):
        quantize_blocks(fresh(), [], SETTINGS)


KINDS = {
    "experts": {
        "experts": {"kind": "sparse", "num_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 1}
    },
    "soft experts": {"experts": {"kind": "soft", "num_experts": 3, "moe_intermediate_size": 32}},
    "latent attention": {
        "attention": "mla",
        "num_key_value_heads": 4,
        "attention_bias": "none",
        "mla": {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    },
    "state space": {
        "pattern": ["mamba2"],
        "attention_bias": "none",
        "ssm": {"state_size": 8, "head_dim": 16, "chunk_size": 8},
    },
    "content": {
        "pattern": ["routing", "lsh"],
        "routing": {"num_clusters": 4, "chunk_size": 8},
        "lsh": {"num_buckets": 4, "chunk_size": 8},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_of_every_kind_of_layer_is_quantized(kind: str) -> None:
    """And on the text it was calibrated on no leaf is worse than rounding to the nearest, most are better."""
    model, told = fresh(**KINDS[kind]), []
    found = quantize_blocks(model, text(), SETTINGS, lambda name, figures: told.append(figures))
    wanted = {leaf.name for leaf in leaves(model) if leaf.kind == "linear" and leaf.shape[1] % 16 == 0}
    assert set(found) == wanted and len(wanted) > 4
    assert all(figures["error"] <= figures["nearest_error"] * 1.001 for figures in told)
    better = sum(figures["error"] < 0.9 * figures["nearest_error"] for figures in told)
    assert better > 0.5 * len(told)


def test_an_expert_that_no_token_came_to_is_rounded_as_if_its_inputs_were_alike() -> None:
    model = fresh(
        experts={"kind": "sparse", "num_experts": 4, "num_experts_per_tok": 1, "correction_bias": True}
    )
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[2] = -1e4
    before = {leaf.name: leaf.module.weight.detach().clone() for leaf in leaves(model)}
    found = quantize_blocks(model, text(), SETTINGS)
    idle = [name for name in found if "experts.2." in name]
    assert len(idle) == 3 * len(model.model.layers)
    for name in idle:
        expected = gptq(before[name], torch.eye(before[name].shape[1]), SETTINGS).dequantize()
        assert torch.equal(found[name].dequantize(), expected)
        assert float((expected - before[name]).norm() / before[name].norm()) < 0.15
