"""Latent attention: its contracts, transformers' DeepSeek-V3 as the oracle, and its two computations against each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from llmctl.kernels.quantized import Quantized
from llmctl.model.context import Context, plain_context
from llmctl.model.mla import MultiHeadLatentAttention
from llmctl.model.packed import PackedLinear
from llmctl.model.ready import ready
from llmctl.model.rope import rotary_tables
from llmctl.recipe.model import ModelSection
from tests.model.mixing import LENGTH, SMALL, CausalContracts, Contracts, Tower, close, ids

MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
CASES = {
    "plain": {},
    "compressed queries, biases": {"mla": {**MLA, "q_lora_rank": 12}, "attention_bias": "all"},
    "biases of inputs": {"mla": MLA, "attention_bias": "qkv"},
    "wide values": {"mla": {**MLA, "v_head_dim": 20}},
    "yarn": {"rope_parameters": YARN},
    "window": {"pattern": ["sliding", "full"], "sliding_window": 6},
    "soft cap": {"attn_logit_softcapping": 2.0},
}


def tower_of(name: str, **settings) -> Tower:
    return Tower(**{"attention": "mla", "mla": MLA, **CASES[name], **settings})


@pytest.fixture(params=CASES)
def tower(request):
    return tower_of(request.param)


class TestMla(CausalContracts):
    pass


class TestMlaEncoder(Contracts):
    @pytest.fixture
    def tower(self):
        return tower_of("plain", stack="encoder")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"qk_norm": True},
            "attention: mla normalises what it compresses, not queries and keys; drop qk_norm",
        ),
        ({"head_dim": 8}, "attention: mla has widths of its own; set those of mla instead of head_dim"),
    ],
)
def test_settings_it_would_pass_over_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        tower_of("plain", **settings)


# --- transformers -----------------------------------------------------------------------------------


def theirs(model: ModelSection, interleaved: bool) -> tuple[DeepseekV3Attention, DeepseekV3RotaryEmbedding]:
    assert model.mla is not None
    config = DeepseekV3Config(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        attention_bias=model.attention_bias == "all",
        rope_parameters=model.rope_parameters.model_dump(exclude_none=True),
        rope_interleave=interleaved,
        max_position_embeddings=64,
        attn_implementation="eager",
        **model.mla.model_dump(),
    )
    return DeepseekV3Attention(config, 0).eval(), DeepseekV3RotaryEmbedding(config)


def half_split(weight: torch.Tensor, heads: int, width: int, turning: int) -> torch.Tensor:
    """Rows of DeepSeek's turned pairs (0, 1), (2, 3) … in the order of ours: (0, P/2), (1, P/2 + 1) …"""
    rows = torch.arange(width)
    rows[-turning:] = width - turning + torch.cat([torch.arange(0, turning, 2), torch.arange(1, turning, 2)])
    return weight.unflatten(0, (heads, width))[:, rows].flatten(0, 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["plain", "compressed queries, biases", "yarn", "wide values"])
@torch.no_grad()
def test_transformers_computes_the_same(name, interleaved):
    model = tower_of(name).spec
    mine = MultiHeadLatentAttention(model, 0).eval()
    other, rotary = theirs(model, interleaved)
    for weight in other.parameters():
        nn.init.normal_(weight, 0.5 if weight.dim() == 1 else 0.0, 0.3)
    weights = dict(other.state_dict())
    if interleaved:
        turning, width = MLA["qk_rope_head_dim"], MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"]
        query = "q_proj.weight" if "q_proj.weight" in weights else "q_b_proj.weight"
        weights[query] = half_split(weights[query], model.num_attention_heads, width, turning)
        for key in [key for key in weights if key.startswith("kv_a_proj_with_mqa")]:
            weights[key] = half_split(weights[key], 1, MLA["kv_lora_rank"] + turning, turning)
    mine.load_state_dict(weights)
    x = torch.randn(2, LENGTH, model.hidden_size)
    tables = rotary(x, torch.arange(LENGTH)[None])
    hidden = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    expected, _ = other(x, tables, hidden)
    close(mine(x, context(model), None), expected)


# --- two computations -------------------------------------------------------------------------------


def context(model: ModelSection, length: int = LENGTH, past: int = 0) -> Context:
    ctx = plain_context(length, past)
    ctx.rotary = rotary_tables(model, ctx.queries.position)
    return ctx


def counted(tower: Tower, monkeypatch) -> dict[str, int]:
    """How often each computation ran, from now on."""
    calls = {"_absorbed": 0, "_expanded": 0}
    for name in calls:
        whole = getattr(MultiHeadLatentAttention, name)

        def count(self, *given, name=name, whole=whole):
            calls[name] += 1
            return whole(self, *given)

        monkeypatch.setattr(MultiHeadLatentAttention, name, count)
    return calls


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_absorbed_equals_expanded(name, length, monkeypatch):
    tower = tower_of(name)
    found = []
    for absorbs in (True, False):
        monkeypatch.setattr(MultiHeadLatentAttention, "absorbs", lambda self, *sizes, a=absorbs: a)
        calls = counted(tower, monkeypatch)
        found.append(tower.decoded(ids(), [LENGTH - length, length]))
        assert (calls["_absorbed"] > 0) == absorbs
    close(*found)


def test_the_computation_with_fewer_products_is_taken(monkeypatch):
    attention = tower_of("plain").layers[0].self_attn
    # R = 16, N = V = 8, P = 4: one query of 20 keys takes 256 + 800 products a head, or 5120 + 400
    assert attention.absorbs(1, 20) and not attention.absorbs(20, 20)
    tower = tower_of("plain")
    calls = counted(tower, monkeypatch)
    with torch.no_grad():
        tower.decoded(ids(), [LENGTH - 2, 1, 1])
    assert calls == {"_absorbed": 4, "_expanded": 2}


def test_a_trace_shows_each_head():
    tower, noted = tower_of("plain"), {}
    states = tower.init_states(1)
    with torch.no_grad():
        tower(ids(1)[:, :-1], None, states)
        ctx = plain_context(1, LENGTH - 1)
        ctx.trace = lambda layer, name, value: noted.setdefault((layer, name), value.shape)
        tower(ids(1)[:, -1:], ctx, states)
    assert noted[0, "queries"] == (1, 4, 1, 12) and noted[1, "keys"] == (1, 4, LENGTH, 12)
    assert noted[0, "values"] == (1, 4, LENGTH, 8) and noted[0, "visible"] == (1, 1, LENGTH)


def test_gradients_through_absorbed_attention_equal_expanded(monkeypatch):
    found = []
    for absorbs in (True, False):
        tower = tower_of("plain")
        monkeypatch.setattr(MultiHeadLatentAttention, "absorbs", lambda self, *sizes, a=absorbs: a)
        states = tower.init_states(2)
        with torch.no_grad():
            tower(ids()[:, :-3], None, states)
        tower(ids()[:, -3:], plain_context(3, LENGTH - 3), states).square().sum().backward()
        found.append({name: w.grad for name, w in tower.named_parameters() if w.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-4, rtol=1e-3)


# --- what stands in the place of a matrix -----------------------------------------------------------


class Doubled(nn.Module):
    """An adapter of an unknown kind."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base(x)


@torch.no_grad()
def test_an_adapter_is_not_passed_over(monkeypatch):
    tower = tower_of("plain")
    for layer in tower.layers:
        layer.self_attn.kv_b_proj = Doubled(layer.self_attn.kv_b_proj)
    calls = counted(tower, monkeypatch)
    close(tower.decoded(ids(), [LENGTH - 2, 1, 1]), tower(ids()))
    assert calls["_absorbed"] == 0


@torch.no_grad()
def test_a_model_made_ready_still_absorbs(monkeypatch):
    tower = tower_of("plain")
    expected = tower(ids())
    ready(tower)
    assert tower.layers[0].self_attn.joined is not None
    calls = counted(tower, monkeypatch)
    close(tower.decoded(ids(), [LENGTH - 2, 1, 1]), expected)
    assert calls["_absorbed"] == 4


@torch.no_grad()
def test_packed_weights_are_read_as_they_are(monkeypatch):
    tower = tower_of("plain")
    for layer in tower.layers:
        attention = layer.self_attn
        codes = torch.randint(-127, 128, attention.kv_b_proj.weight.shape, dtype=torch.int8)
        packed = PackedLinear(Quantized(codes, torch.full((len(codes), 1), 2**-9), None, 8), None)
        packed.settle(torch.device("cpu"), exact=True)
        attention.kv_b_proj = packed
    calls = counted(tower, monkeypatch)
    close(tower.decoded(ids(), [LENGTH - 2, 1, 1]), tower(ids()))
    assert calls["_absorbed"] == 4


# --- memory -----------------------------------------------------------------------------------------


def test_memory_is_a_latent_and_a_key_of_all_heads():
    tower = tower_of("plain")
    states = tower.init_states(2)
    with torch.no_grad():
        tower(ids(), None, states)
    assert [state.nbytes for state in states] == [2 * LENGTH * (16 + 4) * 4] * 2


def test_memory_of_deepseek_v3_is_that_of_two_and_a_quarter_groups():
    shape = {**SMALL, "num_attention_heads": 8}
    mla = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    sizes = []
    for settings in ({"head_dim": 128}, {"attention": "mla", "mla": mla}):
        state = Tower(**shape, **settings).layers[0].init_state(1, 10, torch.bfloat16, torch.device("cpu"))
        state.length = 10
        sizes.append(state.nbytes / 10)
    assert sizes == [4096, 1152] and 1152 / 4096 == 2.25 / 8
