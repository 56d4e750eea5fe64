"""Attention by content: its contracts, the definition by loops, and centroids that follow the queries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmctl.model.content import LshAttention, RoutingAttention, update_centroids
from llmctl.model.context import padded_context, plain_context
from tests.model.mixing import LENGTH, CausalContracts, Contracts, Tower, close, ids, masked

ROUTING = {"pattern": ["routing"], "routing": {"num_clusters": 3, "chunk_size": 4, "decay": 0.9}}
LSH = {"pattern": ["lsh"], "lsh": {"num_buckets": 4, "num_hashes": 2, "chunk_size": 4}}
CASES = {
    "routing": ROUTING,
    "routing, groups, learned norms, biases": {
        **ROUTING,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "attention_bias": "all",
    },
    "routing, learned positions": {**ROUTING, "position": "learned"},
    "routing beside a window": {**ROUTING, "pattern": ["routing", "sliding"], "sliding_window": 5},
    "lsh": LSH,
    "lsh, groups, learned norms, biases": {
        **LSH,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "attention_bias": "all",
    },
    "lsh, one round, no positions": {
        "pattern": ["lsh"],
        "lsh": {"num_buckets": 2, "num_hashes": 1, "chunk_size": 3},
        "position": "none",
    },
}


@pytest.fixture(params=CASES)
def tower(request):
    return Tower(**CASES[request.param])


class TestContent(CausalContracts):
    pass


class TestContentEncoder(Contracts):
    @pytest.fixture(params=["routing", "lsh"])
    def tower(self, request):
        return Tower(**CASES[request.param], stack="encoder")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attn_logit_softcapping": 2.0}, "layers do not bend scores, but attn_logit_softcapping is set"),
        ({"attention_dropout": 0.1}, "layers drop no weights, but attention_dropout is set"),
        ({"position": "alibi"}, "layers take no score bias, but position is `alibi`"),
    ],
)
@pytest.mark.parametrize("name", ["routing", "lsh"])
def test_settings_they_would_pass_over_are_refused(name, settings, said):
    with pytest.raises(ValueError, match=f"`{name}` {said}"):
        Tower(**CASES[name], **settings)


# --- the definition, token by token -----------------------------------------------------------------


def mixer_of(name: str, **settings):
    """The mixer of a tower without positions, so that nothing is turned."""
    return Tower(**{**CASES[name], "position": "none", **settings}).layers[0].self_attn


def seen_by(names: list, t: int, chunk: int) -> set[int]:
    """The tokens up to t that have its name, in its chunk of such tokens or the one before."""
    same = [s for s in range(t + 1) if names[s] == names[t]]
    place = len(same) - 1
    return {s for rank, s in enumerate(same) if rank // chunk >= place // chunk - 1}


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list[set[int]]) -> torch.Tensor:
    """[T, D] from q, k and v [T, D]."""
    rows = []
    for t, tokens in enumerate(seen):
        keys = sorted(tokens)
        weights = (k[keys] @ q[t] / math.sqrt(len(q[t]))).softmax(0)
        rows.append(weights @ v[keys])
    return torch.stack(rows)


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x[0].unflatten(-1, (-1, width)).transpose(0, 1)


@torch.no_grad()
def test_routing_sees_the_cluster_of_the_nearest_centroid():
    mixer, x = mixer_of("routing"), torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    q, k = (F.layer_norm(heads(p(x), 8), (8,)) for p in (mixer.q_proj, mixer.k_proj))
    v, outs, clusters = heads(mixer.v_proj(x), 8), [], set()
    for head in range(4):
        angles = F.cosine_similarity(q[head][:, None], mixer.centroids[head][None], dim=-1)
        names = angles.argmax(1).tolist()
        clusters |= set(names)
        seen = [seen_by(names, t, 4) for t in range(LENGTH)]
        outs.append(attended(q[head], k[head], v[head], seen))
    assert clusters == {0, 1, 2}
    expected = mixer.o_proj(torch.stack(outs).transpose(0, 1).flatten(1))
    close(mixer(x, plain_context(LENGTH), None)[0], expected)


@torch.no_grad()
def test_lsh_sees_what_any_round_puts_together():
    mixer, x = mixer_of("lsh"), torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    q, v = heads(mixer.qk_proj(x), 8), heads(mixer.v_proj(x), 8)
    hashes = mixer.hashes(q[None])[0]
    outs, alone = [], 0
    for head in range(4):
        seen = []
        for t in range(LENGTH):
            rounds = [seen_by(hashes[head, :, r].tolist(), t, 4) for r in range(2)]
            others = set.union(*rounds) - {t}
            alone += not others
            seen.append(others or {t})
        outs.append(attended(q[head], F.normalize(q[head], dim=-1), v[head], seen))
    assert 4 <= alone < 4 * LENGTH  # the first token of each head at least, and not all
    expected = mixer.o_proj(torch.stack(outs).transpose(0, 1).flatten(1))
    close(mixer(x, plain_context(LENGTH), None)[0], expected)


# --- hashes -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_hashes_are_the_same_everywhere_and_differ_by_layer_head_and_round():
    shape = {"num_buckets": 16, "num_hashes": 3}
    tower = Tower(pattern=["lsh"], lsh=shape)
    first, second = (layer.self_attn for layer in tower.layers)
    q = torch.randn(1, 1, 500, 8, generator=torch.Generator().manual_seed(0)).expand(1, 4, -1, -1)
    found = first.hashes(q)
    assert torch.equal(found, LshAttention(tower.spec, 0).hashes(q))
    assert found.unique().tolist() == list(range(16))
    names = [found[0, head, :, r] for head in range(4) for r in range(3)] + [second.hashes(q)[0, 0, :, 0]]
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (one == other).float().mean() < 0.35
    assert not [name for name in tower.state_dict() if "sign" in name]


@torch.no_grad()
def test_near_vectors_share_hashes_and_opposite_ones_do_not():
    mixer = Tower(pattern=["lsh"], lsh={"num_buckets": 8, "num_hashes": 4}).layers[0].self_attn
    q = torch.randn(1, 4, 300, 8, generator=torch.Generator().manual_seed(0))
    near = q + 0.05 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    assert (mixer.hashes(q) == mixer.hashes(near)).float().mean() > 0.9
    assert torch.equal(mixer.hashes(3 * q), mixer.hashes(q))
    assert not (mixer.hashes(q) == mixer.hashes(-q)).any()


# --- memory -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["routing", "lsh"])
def test_buckets_are_kept_as_numbers_in_half_precision_too(name):
    mixer = mixer_of(name)
    state = mixer.init_state(2, 0, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(2, LENGTH, 32)
    mixer(x, plain_context(LENGTH), state)
    assert [part.dtype for part in state.parts] == [torch.bfloat16, torch.bfloat16, torch.int32]
    rounds = 1 if name == "routing" else 2
    assert state.nbytes == 2 * LENGTH * 4 * (2 * 8 * 2 + rounds * 4)


# --- centroids --------------------------------------------------------------------------------------


def routing_tower() -> tuple[Tower, RoutingAttention]:
    tower = Tower(**CASES["routing"], num_hidden_layers=1).train()
    return tower, tower.layers[0].self_attn


def queries_of(mixer: RoutingAttention, x: torch.Tensor) -> torch.Tensor:
    """[H, B · T, D], of length 1."""
    q = mixer.q_proj(x).unflatten(-1, (4, 8)).permute(2, 0, 1, 3).flatten(1, 2)
    return F.normalize(F.layer_norm(q, (8,)), dim=-1)


def test_centroids_move_towards_their_queries():
    _, mixer = routing_tower()
    x, before = torch.randn(2, LENGTH, 32), F.normalize(mixer.centroids.clone(), dim=-1)
    for _ in range(2):  # two micro-batches of one step
        mixer(x, plain_context(LENGTH), None)
    unchanged = mixer.centroids.clone()
    assert torch.equal(F.normalize(unchanged, dim=-1), before)
    q = queries_of(mixer, x).detach()
    update_centroids(mixer)
    for head in range(4):
        nearest = (q[head] @ before[head].T).argmax(-1)
        for cluster in range(3):
            mine = q[head][nearest == cluster]
            assert len(mine)
            moved = F.normalize(0.9 * before[head, cluster] + 0.1 * mine.mean(0), dim=0)
            torch.testing.assert_close(mixer.centroids[head, cluster], moved)
    after = mixer.centroids.clone()
    update_centroids(mixer)
    torch.testing.assert_close(mixer.centroids, after)


def test_centroids_find_the_clusters_of_the_queries():
    _, mixer = routing_tower()
    x = torch.randn(4, LENGTH, 32, generator=torch.Generator().manual_seed(5))
    found = []
    for _ in range(40):
        mixer(x, plain_context(LENGTH), None)
        with torch.no_grad():
            angles = queries_of(mixer, x) @ F.normalize(mixer.centroids, dim=-1).transpose(1, 2)
            found.append(float(angles.amax(-1).mean()))
        update_centroids(mixer)
    assert found[-1] > found[0] + 0.15


def test_only_training_with_gradients_counts():
    tower, mixer = routing_tower()
    with torch.no_grad():
        tower(ids())
    assert mixer.gathered is None
    tower.eval()
    tower(ids())
    before = mixer.centroids.clone()
    update_centroids(tower)
    assert mixer.gathered is None and torch.equal(mixer.centroids, before)


def test_padding_does_not_move_centroids():
    found = []
    for padded in (True, False):
        _, mixer = routing_tower()
        x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
        mask = masked("left", (13,))
        if padded:
            mixer(x, padded_context(mask, LENGTH), None)
        else:
            mixer(x[:, LENGTH - 13 :], plain_context(13), None)
        update_centroids(mixer)
        found.append(mixer.centroids)
    torch.testing.assert_close(*found)


def test_centroids_are_saved_and_stay_in_single_precision():
    tower, mixer = routing_tower()
    assert "layers.0.self_attn.centroids" in tower.state_dict()
    before = mixer.centroids.clone()
    assert before.any()  # `initialize` fills them
    tower(ids())
    tower.bfloat16()
    assert mixer.centroids.dtype == torch.float32 and torch.equal(mixer.centroids, before)
    assert not [name for name in tower.state_dict() if "gathered" in name]
    with torch.device("meta"):
        empty = RoutingAttention(tower.spec, 0)
    assert empty.to_empty(device="cpu").bfloat16().centroids.dtype == torch.float32


def test_recomputed_passes_move_centroids_alike():
    found = []
    for recompute in (False, True):
        tower, mixer = routing_tower()
        ctx = plain_context(LENGTH)
        call = None
        if recompute:

            def call(layer, x, ctx, state):
                return torch.utils.checkpoint.checkpoint(layer, x, ctx, state, use_reentrant=False)

        tower.run(tower.embed(ids(), ctx), ctx, call=call).square().sum().backward()
        update_centroids(tower)
        found.append(mixer.centroids)
    torch.testing.assert_close(*found)
