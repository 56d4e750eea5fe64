"""GPTQ of one layer against the definition, and what it is for: less error in what the layer gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from llmctl.kernels.quantized import Quantized
from llmctl.quantize.absmax import absmax
from llmctl.quantize.gptq import Gptq, Singular, gptq, gptq_reference, inverse_factor
from llmctl.quantize.scales import best_scale, rounded


def layer(
    seed: int = 0, outputs: int = 24, inputs: int = 256, tokens: int = 700
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [O, I], a Hessian [I, I] and other inputs [N, I] of its kind: correlated, some much larger."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=random)
    mix = torch.randn(inputs // 4, inputs, generator=random)
    size = torch.exp(1.5 * torch.randn(inputs, generator=random))
    hidden = torch.randn(2 * tokens, inputs // 4, generator=random)
    x = (hidden @ mix + torch.randn(2 * tokens, inputs, generator=random)) * size
    seen, held_out = x[:tokens], x[tokens:]
    return weight, 2 / tokens * seen.T @ seen, held_out


def error(weight: torch.Tensor, found: Quantized, x: torch.Tensor) -> float:
    """||XW^T - XQ^T||² / ||XW^T||²."""
    return float((x @ (weight - found.dequantize()).T).norm() ** 2 / (x @ weight.T).norm() ** 2)


def same(a: Quantized, b: Quantized) -> float:
    """Share of equal codes."""
    return float((a.codes == b.codes).float().mean())


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order"),
    list(product((8, 4, 3), (None, 32, 128), (True, False), (True, False))),
    ids=str,
)
def test_equals_the_definition(bits: int, group: int | None, symmetric: bool, act_order: bool) -> None:
    """In float64 to the code. In float32 codes differ where the two fall on two sides of a half, and in what follows
    from that: at 8 bits, whose steps are 16 times finer than those of 4, on some processors in one of 300."""
    settings = Gptq(bits, group, symmetric, act_order)
    weight, hessian, x = layer(seed=bits)
    narrow = gptq(weight, hessian, settings)
    fast, plain = (solve(weight.double(), hessian, settings) for solve in (gptq, gptq_reference))
    assert fast.bits == bits and fast.group == (group or 256)
    assert torch.equal(fast.scale, plain.scale)
    assert (fast.zero is None) is symmetric
    assert symmetric or torch.equal(fast.zero, plain.zero)
    assert same(fast, plain) > 0.9999
    assert error(weight, fast, x) == pytest.approx(error(weight, plain, x), rel=1e-4)
    assert same(narrow, plain) > (0.99 if bits == 8 else 0.999)
    assert error(weight, narrow, x) == pytest.approx(error(weight, plain, x), rel=1e-2 if bits == 8 else 1e-3)


@pytest.mark.parametrize("block", [1, 7, 256, 1000])
def test_blocks_change_nothing(block: int) -> None:
    weight, hessian, _ = layer()
    settings = Gptq(group=32)
    found = gptq(weight, hessian, replace(settings, block=block))
    assert same(found, gptq(weight, hessian, settings)) > 0.99


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("group", [None, 128])
def test_each_part_lowers_the_error_on_inputs_it_has_not_seen(bits: int, group: int | None) -> None:
    """Round to nearest, the same at the best scales, GPTQ, GPTQ by size of the inputs; geometric means of 6 layers."""
    logs: dict[str, float] = {}
    for seed in range(6):
        weight, hessian, x = layer(seed)
        plain = gptq(weight, hessian, Gptq(bits, group, act_order=False))
        scales = replace(
            plain, codes=absmax_at(weight, plain.scale, bits)
        )  # what is left of GPTQ when no column makes good for another
        sides = {
            "nearest": absmax(weight, bits, group),
            "scales": scales,
            "plain": plain,
            "ordered": gptq(weight, hessian, Gptq(bits, group)),
        }
        for name, found in sides.items():
            logs[name] = logs.get(name, 0.0) + float(torch.tensor(error(weight, found, x)).log()) / 6
    nearest, scales_only, without, ordered = (
        logs[name] for name in ("nearest", "scales", "plain", "ordered")
    )
    assert scales_only < nearest - 0.05
    assert without < scales_only - 0.5
    assert ordered < without - 0.1


def absmax_at(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes at given scales."""
    groups = weight.unflatten(1, (scale.shape[1], -1))
    return (rounded(groups, scale[..., None], 0.0, bits) / scale[..., None]).round().flatten(1).to(torch.int8)


def test_inputs_that_say_nothing_of_each_other_leave_rounding_to_nearest() -> None:
    weight, _, _ = layer()
    found = gptq(weight, torch.eye(256), Gptq(group=32))
    scale, _ = best_scale(weight, torch.ones(256), 4, 32, True)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.codes, absmax_at(weight, scale, 4))


def test_groups_stay_where_they_are() -> None:
    """The order of the columns changes codes, not which columns share a scale, nor the scales."""
    weight, hessian, _ = layer()
    ordered, plain = (gptq(weight, hessian, Gptq(group=32, act_order=order)) for order in (True, False))
    assert (ordered.scale == plain.scale).float().mean() > 0.99
    assert same(ordered, plain) < 0.95


def test_a_factor_of_the_hessian_changes_nothing() -> None:
    weight, hessian, _ = layer()
    assert same(gptq(weight, hessian * 4096, Gptq(group=32)), gptq(weight, hessian, Gptq(group=32))) > 0.99


def test_a_zero_of_its_own_serves_groups_that_are_not_about_zero() -> None:
    weight, hessian, x = layer()
    weight = weight + 2 * torch.randn(24, 8).repeat_interleave(32, 1)
    symmetric, asymmetric = (gptq(weight, hessian, Gptq(group=32, symmetric=s)) for s in (True, False))
    assert error(weight, asymmetric, x) < 0.7 * error(weight, symmetric, x)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_were_always_zero(act_order: bool, symmetric: bool) -> None:
    """They are rounded to nearest, and the others are as if they were not there."""
    weight, hessian, _ = layer()
    hessian[64:96], hessian[:, 64:96] = 0.0, 0.0
    settings = Gptq(group=32, symmetric=symmetric, act_order=act_order)
    found = gptq(weight, hessian, settings)
    live = [column for column in range(256) if not 64 <= column < 96]
    alone = gptq(weight[:, live], hessian[live][:, live], settings)
    assert float((found.codes[:, live] == alone.codes).float().mean()) > 0.99
    dead, scale = found.dequantize()[:, 64:96], found.scale[:, 2:3]
    cut = found.codes[:, 64:96].abs() >= 7
    assert (((dead - weight[:, 64:96]).abs() <= scale * 0.5001) | cut).all()
    assert same(found, gptq_reference(weight, hessian, settings)) > 0.99


def test_a_layer_that_was_never_given_anything() -> None:
    weight, _, _ = layer()
    found = gptq(weight, torch.zeros(256, 256), Gptq(group=32))
    assert error(weight, found, torch.eye(256)) < 0.02


def test_rows_and_groups_of_zeros() -> None:
    weight, hessian, x = layer()
    weight[2], weight[4, 32:64] = 0.0, 0.0
    for symmetric in (True, False):
        found = gptq(weight, hessian, Gptq(group=32, symmetric=symmetric))
        assert found.dequantize().isfinite().all()
        assert not found.dequantize()[2].any()
        assert error(weight, found, x) < 0.02


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian, _ = layer()
    upper, damping = inverse_factor(hessian, 0.01)
    assert damping == 0.01
    assert torch.equal(upper, upper.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(256), atol=2e-3, rtol=0)


def broken(least: float) -> torch.Tensor:
    """A Hessian whose mean diagonal is 1 and whose least eigenvalue is `least`."""
    random = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=random, dtype=torch.float64))
    eigenvalues = torch.full((32,), (32 - least) / 31, dtype=torch.float64)
    eigenvalues[0] = least
    return (turn * eigenvalues) @ turn.T


@pytest.mark.parametrize(("least", "expected"), [(0.0, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_grows_until_the_hessian_can_be_factored(least: float, expected: float) -> None:
    upper, damping = inverse_factor(broken(least), 0.01)
    assert damping == pytest.approx(expected)
    assert upper.isfinite().all() and (upper.diagonal() > 0).all()


def test_damping_ends_somewhere() -> None:
    with pytest.raises(Singular, match="not positive definite with 10 times the mean added to its diagonal"):
        gptq(layer(inputs=32)[0], broken(-20.0), Gptq(group=None))


def test_fewer_tokens_than_inputs() -> None:
    """The Hessian is singular; damping makes something of it."""
    weight, hessian, x = layer(tokens=100)
    assert torch.linalg.matrix_rank(hessian.double()) < 256
    found = gptq(weight, hessian, Gptq(group=32))
    assert error(weight, found, x) < 0.6 * error(weight, absmax(weight, 4, 32), x)
    assert same(found, gptq_reference(weight, hessian, Gptq(group=32))) > 0.98


def test_what_is_given_stays_as_it_was() -> None:
    weight, hessian, _ = layer()
    hessian[3], hessian[:, 3] = 0.0, 0.0
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, Gptq(group=32))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_what_cannot_be_quantized() -> None:
    weight, hessian, _ = layer()
    with pytest.raises(ValueError, match="256 inputs in groups of 96"):
        gptq(weight, hessian, Gptq(group=96))
    hessian[0, 0] = torch.nan
    with pytest.raises(ValueError, match="a weight or its Hessian is not finite"):
        gptq(weight, hessian, Gptq())
    for settings in ({"damping": 0.0}, {"block": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=0"):
            Gptq(**settings)
