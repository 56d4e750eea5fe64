"""Mamba-2: its contracts, transformers' mixer as the oracle, and a memory of one size."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from llmctl.model.context import Context, Tokens, padded_context, plain_context
from llmctl.model.init import role_of
from llmctl.model.mamba import Mamba2
from llmctl.recipe.model import ModelSection
from tests.model.mixing import LENGTH, CausalContracts, Tower, close, ids, masked

SSM = {"state_size": 6, "head_dim": 8, "chunk_size": 5}
CASES = {
    "plain": {"ssm": SSM},
    "groups, biases": {"ssm": {**SSM, "n_groups": 2, "use_bias": True, "conv_kernel": 3}},
    "no bias of the convolution": {"ssm": {**SSM, "use_conv_bias": False, "expand": 3}},
    "no feed-forward": {"ssm": SSM, "ffn": "none", "position": "none"},
    "with attention": {"ssm": SSM, "pattern": ["full", "mamba2"]},
}


def tower_of(name: str, **settings) -> Tower:
    return Tower(**{"pattern": ["mamba2"], **CASES[name], **settings})


@pytest.fixture(params=CASES)
def tower(request):
    return tower_of(request.param)


class TestMamba2(CausalContracts):
    def test_tokens_are_taken_back(self, tower):
        if tower.spec.pattern == ["full", "mamba2"]:
            states = tower.init_states(2)
            tower(ids(), None, states)
            assert [state.cut(6) for state in states] == [6, 0]  # one layer can, one cannot
            return
        super().test_tokens_are_taken_back(tower)


@pytest.mark.parametrize(
    ("ssm", "said"),
    [
        ({"head_dim": 7}, r"expand x hidden_size \(64\) is not a multiple of head_dim \(7\)"),
        ({"n_groups": 3}, r"its 8 heads are not a multiple of n_groups \(3\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(ssm, said):
    with pytest.raises(ValueError, match=f"ssm: {said}"):
        tower_of("plain", ssm={**SSM, **ssm})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", "all"),
        ("qk_norm", True),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
    ],
)
def test_what_only_attention_reads_is_refused_where_there_is_none(field, value):
    settings = {"hidden_size": 32, "num_attention_heads": 4, field: value}
    with pytest.raises(ValueError, match=f"{field} is set but `mamba2` layers do not attend"):
        ModelSection(**settings, pattern=["mamba2"])
    ModelSection(**settings, pattern=["mamba2", "full"])


# --- transformers -----------------------------------------------------------------------------------


def pair(name: str) -> tuple[Mamba2, Mamba2Mixer, Mamba2Config]:
    """Ours and theirs with the same random weights."""
    torch.manual_seed(0)
    model = tower_of(name).spec
    ssm = model.ssm
    config = Mamba2Config(
        num_heads=ssm.expand * model.hidden_size // ssm.head_dim,
        hidden_size=model.hidden_size,
        num_hidden_layers=1,
        layer_norm_epsilon=model.norm_eps,
        **ssm.model_dump(exclude={"time_step_min", "time_step_max", "time_step_floor"}),
    )
    mine, theirs = Mamba2(model, 0).eval(), Mamba2Mixer(config, 0).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs, config


MIXERS = ["plain", "groups, biases", "no bias of the convolution"]


@pytest.mark.parametrize("name", MIXERS)
def test_transformers_computes_the_same(name):
    mine, theirs, _ = pair(name)
    x = torch.randn(2, LENGTH, 32)
    found, expected = mine(x, plain_context(LENGTH), None), theirs(x)
    close(found, expected)
    upstream = torch.randn_like(found)
    found.backward(upstream), expected.backward(upstream)
    others = dict(theirs.named_parameters())
    for name, weight in mine.named_parameters():
        torch.testing.assert_close(weight.grad, others[name].grad, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_transformers_decodes_the_same(name):
    mine, theirs, config = pair(name)
    x, cache = torch.randn(2, LENGTH, 32), DynamicCache(config=config)
    state = mine.init_state(2, 0, torch.float32, torch.device("cpu"))
    for first, last in ((0, 9), (9, 10), (10, 11), (11, 12)):
        found = mine(x[:, first:last], plain_context(last - first, first), state)
        close(found, theirs(x[:, first:last], cache_params=cache))
        close(state.tensors[1], cache.layers[0].recurrent_states[0])


@torch.no_grad()
def test_transformers_pads_the_same_on_the_left():
    mine, theirs, _ = pair("plain")
    x, mask = torch.randn(2, LENGTH, 32), masked("left")
    found, expected = mine(x, padded_context(mask, LENGTH), None), theirs(x, attention_mask=mask)
    close(found[mask.bool()], expected[mask.bool()])


# --- memory -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_memory_does_not_grow():
    tower = tower_of("plain")
    states, sizes = tower.init_states(2), set()
    for past in range(0, LENGTH, 5):
        tower(ids()[:, past : past + 5], plain_context(5, past), states)
        sizes.add(states[0].nbytes)
        assert states[0].length == past + 5
    # window [3, 64 + 2 · 6] and state [8 heads, 8, 6], in float32 for two rows
    assert sizes == {2 * 4 * (3 * 76 + 8 * 8 * 6)}


@torch.no_grad()
def test_padding_leaves_no_trace_in_the_memory():
    tower, mask = tower_of("plain"), masked("right", (LENGTH, 13))
    states, alone = tower.init_states(2), tower.init_states(1)
    tower(ids(), padded_context(mask, LENGTH), states)
    tower(ids()[1:, :13], None, alone)
    for state, other in zip(states, alone, strict=True):
        for found, expected in zip(state.tensors, other.tensors, strict=True):
            close(found[1:], expected)


@torch.no_grad()
def test_memory_is_that_of_the_last_document():
    tower, mask = tower_of("plain"), masked("right", (LENGTH, 13))
    positions = torch.stack([torch.arange(LENGTH), torch.cat([torch.arange(n) for n in (11, 9)])])
    states, alone = tower.init_states(2), tower.init_states(1)
    tower(ids(), padded_context(mask, LENGTH, positions), states)
    tower(ids()[1:, 11:13], None, alone)
    for state, other in zip(states, alone, strict=True):
        for found, expected in zip(state.tensors, other.tensors, strict=True):
            close(found[1:], expected)


def test_only_another_document_starts_anew():
    padding, first, second = 0, 1, 2
    row = torch.tensor([[padding, first, first, padding, first, second, second]])
    keys = Tokens(torch.arange(7)[None], row)
    for new in (7, 3, 2, 1):
        starts = Context(Tokens(keys.position[:, -new:], row[:, -new:]), keys).starts()
        assert starts.tolist() == [[False, False, False, False, False, True, False][-new:]]
    assert plain_context(3).starts() is None


def test_parameters_start_as_mamba_2_has_them():
    mixer = tower_of("plain").layers[0].self_attn
    assert {name: role_of(f"layers.0.self_attn.{name}") for name, _ in mixer.named_parameters()} == {
        "dt_bias": "steps",
        "A_log": "rates",
        "D": "one",
        "in_proj.weight": "normal",
        "conv1d.weight": "short",
        "conv1d.bias": "zero",
        "norm.weight": "one",
        "out_proj.weight": "residual",
    }
