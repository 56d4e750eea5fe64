"""Experts: every kind against its definition token by token, and after the passes that change a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmctl.model.context import packed_context, padded_context, plain_context
from llmctl.model.experts import dispatch_grouped, dispatch_loop, is_grouped
from llmctl.model.leaves import leaves
from llmctl.model.ready import ready
from tests.model.expert_cases import CAUSAL, KINDS, LOOKING, E, X, layer_of

# --- definitions: one document [n, E] -> [n, E] -----------------------------------------------------


def sparse(layer: nn.Module, x: Tensor) -> Tensor:
    spec, rows = layer.gate.spec, []
    for token in x:
        logits = layer.gate.weight @ token
        scores = logits.sigmoid() if spec.scoring_func == "sigmoid" else logits.softmax(0)
        biased = scores if not spec.correction_bias else scores + layer.gate.e_score_correction_bias
        groups = biased.view(spec.n_group, -1)
        best = sorted(range(spec.n_group), key=lambda g: -float(groups[g].sort().values[-2:].sum()))
        allowed = {g * groups.shape[1] + i for g in best[: spec.topk_group] for i in range(groups.shape[1])}
        chosen = sorted(allowed, key=lambda i: -float(biased[i]))[: spec.num_experts_per_tok]
        total = sum(scores[i] for i in chosen) if spec.norm_topk_prob else 1.0
        given = sum(scores[i] / total * layer.experts[i](token[None])[0] for i in chosen)
        rows.append(given * spec.routed_scaling_factor)
    return torch.stack(rows)


def dense(layer: nn.Module, x: Tensor) -> Tensor:
    p = (x @ layer.gate.weight.T).softmax(-1)
    return torch.stack(
        [sum(p[n, i] * layer.experts[i](x[n : n + 1])[0] for i in range(X)) for n in range(len(x))]
    )


def averaged(layer: nn.Module, p: Tensor, x: Tensor) -> Tensor:
    """The layer whose parameters really are averages."""
    each = [dict(expert.named_parameters()) for expert in layer.experts]
    merged = {name: sum(p[i] * each[i][name] for i in range(X)) for name in each[0]}
    return torch.func.functional_call(layer.experts[0], merged, (x,))


def soft_token(layer: nn.Module, x: Tensor) -> Tensor:
    p = (x @ layer.gate.weight.T).softmax(-1)
    return torch.cat([averaged(layer, p[n], x[n : n + 1]) for n in range(len(x))])


def soft_sequence(layer: nn.Module, x: Tensor) -> Tensor:
    return averaged(layer, (layer.gate.weight @ x.mean(0)).softmax(0), x)


def slots(layer: nn.Module, x: Tensor) -> Tensor:
    logits = x @ layer.gate.weight.T
    given = []
    for slot in range(logits.shape[1]):
        mean = sum(p * token for p, token in zip(logits[:, slot].softmax(0), x, strict=True))
        given.append(layer.experts[slot // layer.slots](mean[None])[0])
    return torch.stack([sum(p * y for p, y in zip(row.softmax(0), given, strict=True)) for row in logits])


def expert_choice(layer: nn.Module, x: Tensor) -> Tensor:
    p, y = (x @ layer.gate.weight.T).softmax(-1), torch.zeros_like(x)
    capacity = min(len(x), math.ceil(len(x) * layer.capacity_factor / X))
    for i in range(X):
        for n in sorted(range(len(x)), key=lambda n: -float(p[n, i]))[:capacity]:
            y[n] += p[n, i] * layer.experts[i](x[n : n + 1])[0]
    return y


DEFINITIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "sparse": sparse,
    "sparse-unnormalised": sparse,
    "sparse-sigmoid-groups": sparse,
    "dense": dense,
    "soft-token": soft_token,
    "soft-sequence": soft_sequence,
    "slots": slots,
    "expert_choice": expert_choice,
}


def by_definition(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    y = DEFINITIONS[name](layer, x)
    return y if layer.shared_experts is None else y + layer.shared_experts(x)


@pytest.mark.parametrize("fields", [{}, {"ffn": "gelu", "mlp_bias": True}], ids=["swiglu", "gelu-biases"])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_document_is_what_the_definition_says(name: str, fields: dict[str, object]) -> None:
    layer = layer_of(name, **fields)
    x = torch.randn(2, 9, E)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    y, routing = layer(x, packed_context(positions))
    assert routing.logits.shape == (18, X)
    for row, start, end in [(0, 0, 4), (0, 4, 9), (1, 0, 7), (1, 7, 9)]:
        wanted = by_definition(name, layer, x[row, start:end])
        torch.testing.assert_close(y[row, start:end], wanted, rtol=1e-5, atol=1e-6)
    whole, _ = layer(x, plain_context(9))
    torch.testing.assert_close(whole[1], by_definition(name, layer, x[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_padding_is_routed_nowhere(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(2, 7, E)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    y, routing = layer(x, padded_context(mask, 7))
    layer.shared_experts, alone = None, layer.shared_experts
    silent, _ = layer(x, padded_context(mask, 7))
    assert not silent[mask == 0].any()
    layer.shared_experts = alone
    one, first = layer(x[:1, 2:], plain_context(5))
    other, second = layer(x[1:, :4], plain_context(4))
    torch.testing.assert_close(torch.cat([y[0, 2:], y[1, :4]]), torch.cat([one[0], other[0]]))
    torch.testing.assert_close(routing.logits, torch.cat([first.logits, second.logits]))
    if routing.load is not None:
        assert torch.equal(routing.load, first.load + second.load)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_later_tokens_change_nothing_earlier(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(2, 8, E)
    changed = torch.cat([x[:, :5], torch.randn(2, 3, E)], 1)
    before, after = layer(x, plain_context(8))[0], layer(changed, plain_context(8))[0]
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


@pytest.mark.parametrize("name", LOOKING)
@torch.no_grad()
def test_kinds_refused_in_a_decoder_do_look_ahead(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(1, 8, E)
    changed = torch.cat([x[:, :5], 3 * torch.randn(1, 3, E)], 1)
    before, after = layer(x, plain_context(8))[0], layer(changed, plain_context(8))[0]
    assert not torch.allclose(before[:, :5], after[:, :5], atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_the_router_and_every_expert_in_use(name: str) -> None:
    layer = layer_of(name).train()
    x = torch.randn(2, 6, E, requires_grad=True)
    y, routing = layer(x, plain_context(6))
    (y.square().sum() + routing.balance + routing.z).backward()
    used = [True] * X if routing.load is None else (routing.load > 0).tolist()
    assert any(used)
    for expert, use in zip(layer.experts, used, strict=True):
        for weight in expert.parameters():
            assert (weight.grad is not None and bool(weight.grad.any())) == use
    for weight in [x, *(w for w in layer.parameters() if w.grad is not None)]:
        assert weight.grad.isfinite().all()
    assert layer.gate.weight.grad.any() and x.grad.any()


@torch.no_grad()
def test_soft_of_a_sequence_is_soft_of_tokens_that_agree() -> None:
    token, sequence = layer_of("soft-token"), layer_of("soft-sequence")
    sequence.load_state_dict(token.state_dict())
    x = torch.randn(2, 6, E)
    for layer in (token, sequence):
        layer.gate.weight[:, 1:] = 0
    assert not torch.allclose(token(x, plain_context(6))[0], sequence(x, plain_context(6))[0], atol=1e-4)
    x[:, :, 0] = torch.tensor([[1.0], [-2.0]])
    torch.testing.assert_close(token(x, plain_context(6))[0], sequence(x, plain_context(6))[0])


# --- layers that a pass has changed -----------------------------------------------------------------


class Wrapped(nn.Module):
    """What an adapter does: its layer, and something low-rank beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(2, layer.in_features) / 4)
        self.up = nn.Parameter(torch.randn(layer.out_features, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_wrapped_layers_compute_as_layers_of_their_sum(name: str) -> None:
    plain, wrapped = layer_of(name), layer_of(name)
    x = torch.randn(2, 6, E)
    before = plain(x, plain_context(6))[0]
    for leaf in list(leaves(wrapped)):
        above, _, last = leaf.name.rpartition(".")
        setattr(wrapped.get_submodule(above), last, layer := Wrapped(leaf.module))
        plain.get_submodule(leaf.name).weight += layer.up @ layer.down
    after = plain(x, plain_context(6))[0]
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(wrapped(x, plain_context(6))[0], after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_ready_for_use_computes_the_same(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(2, 6, E)
    before = layer(x, plain_context(6))[0]
    ready(layer)
    assert not list(leaves(layer))
    torch.testing.assert_close(layer(x, plain_context(6))[0], before, rtol=1e-4, atol=1e-5)


def test_a_pass_finds_experts_and_no_router() -> None:
    names = [leaf.name for leaf in leaves(layer_of("sparse-sigmoid-groups"))]
    assert "experts.3.gate_proj" in names and "shared_experts.down_proj" in names
    assert len(names) == 3 * X + 3
    assert "gate.weight" in dict(layer_of("sparse").named_parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_watched_layer_is_called(name: str) -> None:
    layer = layer_of(name)
    seen: list[int] = []
    for index, expert in enumerate(layer.experts):
        expert.down_proj.register_forward_pre_hook(lambda _, inputs, index=index: seen.append(index))
    routing = layer(torch.randn(2, 6, E), plain_context(6))[1]
    used = range(X) if routing.load is None else routing.load.nonzero().flatten().tolist()
    assert sorted(seen) == list(used)


@pytest.mark.parametrize("ffn", ["swiglu", "geglu"])
def test_grouped_products_are_the_loop(ffn: str) -> None:
    layer = layer_of("sparse", ffn=ffn)
    x, upstream = torch.randn(20, E, requires_grad=True), torch.randn(20, E)
    counts = torch.tensor([7, 0, 9, 3, 0, 13])
    token, weight = torch.randint(20, (32,)), torch.rand(32, requires_grad=True)
    assert all(is_grouped(expert) for expert in layer.experts)
    found = []
    for path in (dispatch_loop, dispatch_grouped):
        inputs = [x, weight, *(w for i in (0, 2, 3, 5) for w in layer.experts[i].parameters())]
        y = path(layer.experts, x, token, weight, counts)
        found.append([y, *torch.autograd.grad(y, inputs, upstream)])
    for loop, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-6)


def test_other_layers_are_not_grouped() -> None:
    assert not is_grouped(layer_of("sparse", ffn="gelu").experts[0])
    assert not is_grouped(layer_of("sparse", mlp_bias=True).experts[0])
    wrapped, laid_out = layer_of("sparse").experts[0], layer_of("sparse")
    wrapped.up_proj = Wrapped(wrapped.up_proj)
    assert not is_grouped(wrapped)
    ready(laid_out)
    assert not is_grouped(laid_out.experts[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_a_layer_on_cuda_is_the_layer_on_the_cpu() -> None:
    layer = layer_of("sparse")
    x = torch.randn(2, 64, E)
    on_cpu, on_cuda = layer(x, plain_context(64)), layer.cuda()(x.cuda(), plain_context(64, device="cuda"))
    torch.testing.assert_close(on_cuda[0].cpu(), on_cpu[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(on_cuda[1].load.cpu(), on_cpu[1].load)
    with torch.autocast("cuda", torch.bfloat16):
        mixed = layer(x.cuda(), plain_context(64, device="cuda"))[0]
    torch.testing.assert_close(mixed.cpu(), on_cpu[0], rtol=0.05, atol=0.02)
