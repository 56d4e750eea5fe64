"""A watched pass: its numbers are those of the model, for every kind of step there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmctl.model import LlmctlForCausalLM
from llmctl.model.attention_maps import OTHER_SCORES, WINDOW, maps
from llmctl.model.checkpoint import new_model
from llmctl.model.open import open_model
from llmctl.model.trace import trace
from llmctl.recipe.model import ModelSection
from tests.model.cases import CASES, ids, theirs

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "gemma": {
        "norm": "rmsnorm1p",
        "norm_placement": "sandwich",
        "ffn": "geglu",
        "embedding_multiplier": 6.0,
        "query_pre_attn_scalar": 24.0,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "pattern": ["sliding", "full"],
        "sliding_window": 5,
    },
    "gpt2": {
        "norm": "layernorm",
        "position": "learned",
        "ffn": "gelu_tanh",
        "attention_bias": "all",
        "mlp_bias": True,
    },
    "post": {"norm": "layernorm", "norm_placement": "post", "position": "sinusoidal", "ffn": "relu"},
    "alibi": {"position": "alibi", "num_key_value_heads": 1},
    "relative": {"position": "relative", "tie_word_embeddings": False},
    "qk-norm": {"position": "none", "qk_norm": True, "ffn": "relu2"},
    "local": {
        "pattern": ["band+global", "dilated"],
        "sliding_window": 3,
        "num_global_tokens": 2,
        "dilation": 2,
    },
    "random": {"pattern": ["random+block"], "block_size": 4, "num_random_blocks": 1},
    "by-content": {"pattern": ["routing", "lsh"]},
    "mla": {"attention": "mla", "mla": {"q_lora_rank": 12, "kv_lora_rank": 16}},
    "mamba2": {"pattern": ["mamba2", "full"], "ssm": {"head_dim": 16, "state_size": 8, "chunk_size": 8}},
    "sparse": {
        "experts": {"kind": "sparse", "num_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    },
    "dense": {"experts": {"kind": "dense", "num_experts": 3}},
    "soft": {"experts": {"kind": "soft", "num_experts": 3}},
}


def model_of(settings: dict[str, Any]) -> LlmctlForCausalLM:
    model = new_model(ModelSection(**SIZES, **settings).resolved(), seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


def tokens(length: int) -> list[int]:
    return torch.randint(
        0, SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(2)
    ).tolist()


@pytest.mark.parametrize("length", [1, 9, WINDOW + 6])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_is_told_as_the_model_computes_it(kind: str, length: int) -> None:
    model, words = model_of(KINDS[kind]), tokens(length)
    found = trace(model, words)
    logits = model(torch.tensor([words])).logits[0]
    torch.testing.assert_close(found.logits, logits[-1], atol=1e-5, rtol=1e-5)
    guess = found.layers[-1].guess
    assert guess is not None
    # the lens of the last layer is the model itself, at every place of the window
    expected = logits[-found.window :].softmax(-1).topk(guess.ids.shape[1]).values
    torch.testing.assert_close(guess.shares, expected, atol=1e-5, rtol=1e-4)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    told = [found.embedding, found.positions, *found.closing, *(s for x in found.layers for s in x.steps)]
    tables = {table.name: table for step in told for table in step.tables}
    assert sum(table.parameters for table in tables.values()) == found.parameters
    for layer in found.layers:
        assert [each.deviation < 1e-5 for each in layer.attention] == [True] * (layer.pattern != "mamba2")
        assert [step.what for step in layer.steps].count("residual") == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_weights_and_values_through_the_output_projection_give_its_output() -> None:
    model = model_of({"num_key_value_heads": 2})
    seen: dict[str, Tensor] = {}
    mixer = model.model.layers[1].self_attn
    for name in ("v_proj", "o_proj"):
        mixer.get_submodule(name).register_forward_hook(lambda _, x, out, n=name: seen.update({n: out[0]}))
    (attention,) = trace(model, tokens(9)).layers[1].attention
    values = seen["v_proj"].unflatten(-1, (2, 8)).transpose(0, 1).repeat_interleave(2, 0)
    out = (attention.weights @ values).transpose(0, 1).flatten(1) @ mixer.o_proj.weight.T
    torch.testing.assert_close(out, seen["o_proj"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_and_probabilities_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    other = theirs(case)
    other.save_pretrained(tmp_path)
    words = ids(1, 24)
    expected = other(words, output_attentions="mamba" not in case)
    found = trace(open_model(tmp_path), words[0].tolist())
    torch.testing.assert_close(
        found.logits.softmax(-1), expected.logits[0, -1].softmax(-1), atol=1e-5, rtol=1e-4
    )
    if "mamba" in case:
        return
    for layer, weights in zip(found.layers, expected.attentions, strict=True):
        torch.testing.assert_close(layer.attention[0].weights, weights[0], atol=1e-5, rtol=1e-4)


def test_maps_are_softmax_of_scaled_products() -> None:
    q, k = torch.randn(4, 3, 8), torch.randn(2, 5, 8)
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(2)[None]
    scores, weights = maps(q, k, allowed, 0.5)
    torch.testing.assert_close(scores[3, 2, 4], 0.5 * (q[3, 2] * k[1, 4]).sum())
    assert not weights[:, 0, 3:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 3))


@torch.no_grad()
def test_what_the_mask_hides_and_what_lies_before_the_window() -> None:
    found = trace(model_of({"pattern": ["sliding"], "sliding_window": 5}), tokens(WINDOW + 6))
    attention = found.layers[0].attention[0]
    length = WINDOW + 6
    assert attention.weights.shape == (4, WINDOW, WINDOW) and found.window == WINDOW
    assert attention.pairs == length**2 and attention.hidden == length**2 - (length * 5 - 10)
    assert attention.allowed.sum(-1).max() == 5
    torch.testing.assert_close(attention.weights.sum(-1) + attention.earlier, torch.ones(4, WINDOW))
    assert attention.earlier[:, 0].min() > 0 and not attention.earlier[:, 5:].any()


@torch.no_grad()
def test_routing_is_what_the_experts_got() -> None:
    model = model_of({"experts": {"kind": "sparse", "num_experts": 4}})
    calls: dict[int, int] = {}
    for number, expert in enumerate(model.model.layers[0].mlp.experts):
        expert.register_forward_hook(lambda _, x, out, n=number: calls.update({n: x[0].shape[0]}))
    routing = trace(model, tokens(9)).layers[0].routing
    assert routing is not None and routing.chosen is not None
    assert routing.chosen.flatten().bincount(minlength=4).tolist() == [calls.get(n, 0) for n in range(4)]
    torch.testing.assert_close(routing.load, torch.tensor([calls.get(n, 0) / 18 for n in range(4)]))
    torch.testing.assert_close(routing.shares.sum(-1), torch.ones(9))


class Mean(nn.Module):
    """A mixer without scores: each token becomes the mean of those up to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, ctx: object, state: object) -> Tensor:
        return self.out_proj(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])

    def prepare(self, ctx: object) -> None: ...


def test_a_mixer_without_scores_says_so() -> None:
    model = model_of({})
    model.model.layers[0].self_attn = Mean(SIZES["hidden_size"])
    first, second = trace(model, tokens(9)).layers
    assert first.attention == [] and len(second.attention) == 1
    assert "Mean has no attention scores to show" in [step.said for step in first.steps]
    assert [s.what for s in first.steps][:4] == ["norm", "output", "scores", "residual"]


def test_scores_that_do_not_give_the_output_are_not_shown() -> None:
    model = model_of({})
    projection = model.model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer = trace(model, tokens(9)).layers[0]
    assert layer.attention == [] and OTHER_SCORES in [step.said for step in layer.steps]
