"""What every encoder and every encoder–decoder promises, over a table of variants each."""

from __future__ import annotations

import pytest
import torch

from llmctl.model import LlmctlForConditionalGeneration, LlmctlForMaskedLM, LlmctlModel
from llmctl.model.checkpoint import load_model, new_of_stack, save_model
from llmctl.model.positions import POSITIONS
from llmctl.plan.size import kv_cache_bytes, parameters, total_parameters
from llmctl.recipe.model import ModelSection
from tests.model.contract import CLOSE
from tests.model.test_encoders import LIKE_BERT
from tests.model.test_seq2seq import answers
from tests.model.variants import EXPERTS, LAYERS, LENGTH, MIXTURES, MLA, SIZES, ids

# --- encoders -----------------------------------------------------------------------------------------

_FEW = {"num_experts": 4, "moe_intermediate_size": 24}
ENCODERS = {
    "plain": {},
    "bert": {name: value for name, value in LIKE_BERT.items() if name != "stack"} | {"type_vocab_size": 2},
    "sandwich-untied": {"norm_placement": "sandwich", "tie_word_embeddings": False},
    "post-rmsnorm-relu": {"norm_placement": "post", "ffn": "relu2"},
    "caps": {"final_logit_softcapping": 3.0, "logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "mla": MLA,
    **{f"position-{kind}": {"position": kind} for kind in POSITIONS},
    **{
        f"layer-{kind}": layer
        for kind, layer in (LAYERS | MIXTURES).items()
        if not {"mamba2", "sliding"} & set(layer.get("pattern", ()))
    },
    "band-alibi": LAYERS["band"] | {"position": "alibi"},
    "bigbird-relative": MIXTURES["bigbird"] | {"position": "relative"},
    **{f"experts-{kind}": {"experts": experts} for kind, experts in EXPERTS.items()},
    "experts-slots": {"experts": {"kind": "slots", **_FEW, "slots_per_expert": 2}},
    "experts-choice": {"experts": {"kind": "expert_choice", **_FEW, "capacity_factor": 1.5}},
    "experts-soft-sequence": {"experts": {"kind": "soft", "routing": "sequence", **_FEW}},
    "experts-slots-band-post": LAYERS["band"]
    | {"norm_placement": "post", "experts": {"kind": "slots", **_FEW, "slots_per_expert": 1}},
}


@pytest.mark.parametrize("stack", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize("pattern", ["sliding", "sliding+global"])
def test_a_window_without_a_bound_ahead_is_for_decoders(stack, pattern):
    sizes = {"sliding_window": 4, "num_global_tokens": 1 if "global" in pattern else None}
    with pytest.raises(
        ValueError, match=f"`sliding` has no bound ahead, where stack: {stack} looks too; `band`"
    ):
        ModelSection(**SIZES, stack=stack, pattern=[pattern], **sizes)


@pytest.fixture(params=ENCODERS)
def encoder(request):
    spec = ModelSection(**SIZES, stack="encoder", **ENCODERS[request.param])
    torch.manual_seed(0)
    model = new_of_stack(spec, seed=1, pad_token_id=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def test_encoder_shape_and_gradients(encoder):
    out = encoder(ids(), labels=ids())
    assert out.logits.shape == (2, LENGTH, SIZES["vocab_size"])
    out.loss.backward()
    for name, weight in encoder.named_parameters():
        if not name.endswith("gate.noise.weight"):  # read in training alone
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            assert weight.grad.any() or "experts." in name, name


@torch.no_grad()
def test_encoder_a_padded_row_is_the_row_alone(encoder):
    x, room = ids(1), 5
    alone, filled, zeros = encoder(x).logits, torch.ones_like(x), torch.zeros(1, room, dtype=torch.long)
    before = encoder(torch.cat([zeros, x], 1), attention_mask=torch.cat([zeros, filled], 1)).logits
    after = encoder(torch.cat([x, zeros], 1), attention_mask=torch.cat([filled, zeros], 1)).logits
    torch.testing.assert_close(before[:, room:], alone, **CLOSE)
    torch.testing.assert_close(after[:, :-room], alone, **CLOSE)


@torch.no_grad()
def test_encoder_a_packed_row_is_its_documents_alone(encoder):
    x, lengths = ids(), [9, 1, LENGTH - 10]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    packed = encoder(x, position_ids=positions).logits
    alone = torch.cat([encoder(part).logits for part in x.split(lengths, dim=1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_encoder_save_and_load_is_exact(encoder, tmp_path):
    save_model(encoder, tmp_path)
    again = load_model(tmp_path, kind=LlmctlForMaskedLM)
    backbone = load_model(tmp_path, kind=LlmctlModel)
    for one, other in ((again, encoder), (backbone, encoder.model)):
        kept, expected = one.state_dict(), other.state_dict()
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[name], value) for name, value in expected.items())
    with torch.no_grad():
        # the file is mapped where it lies, and a product may add in another order there
        torch.testing.assert_close(again(ids()).logits, encoder(ids()).logits, **CLOSE)


def test_encoder_the_planner_counts_what_there_is(encoder):
    spec = encoder.config.spec
    assert total_parameters(spec) == sum(weight.numel() for weight in encoder.parameters())
    assert parameters(spec)["head"] == sum(
        weight.numel() for name, weight in encoder.named_parameters() if not name.startswith("model.")
    )


@torch.no_grad()
def test_encoder_an_encoder_reads_both_ways(encoder):
    """The last token reaches an earlier one."""
    x = ids()
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SIZES["vocab_size"]
    one, other = encoder(x).logits, encoder(changed).logits
    assert not torch.allclose(one[:, :-1], other[:, :-1], atol=1e-5)


# --- encoder–decoders ---------------------------------------------------------------------------------

PAIRS = {
    "plain": {},
    "deeper-decoder-untied": {"num_decoder_layers": 3, "tie_word_embeddings": False},
    "post-layernorm-biases": {
        "norm_placement": "post",
        "norm": "layernorm",
        "embedding_norm": True,
        "attention_bias": "all",
        "mlp_bias": True,
        "ffn": "gelu",
        "type_vocab_size": 2,
    },
    "sandwich-qk-norm": {"norm_placement": "sandwich", "qk_norm": True, "num_key_value_heads": 2},
    "mla": MLA,
    **{
        f"position-{kind}": {"position": kind}
        for kind in ("learned", "sinusoidal", "relative", "alibi", "none")
    },
    **{
        f"layer-{kind}": layer
        for kind, layer in (LAYERS | MIXTURES).items()
        if not {"mamba2", "sliding"} & set(layer.get("pattern", ()))
    },
    **{f"experts-{kind}": {"experts": experts} for kind, experts in EXPERTS.items()},
}


@pytest.fixture(params=PAIRS)
def pair(request):
    spec = ModelSection(**SIZES, stack="encoder_decoder", **PAIRS[request.param])
    model = new_of_stack(spec, seed=1, pad_token_id=0, decoder_start_token_id=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def test_pair_shape_and_gradients(pair):
    out = pair(ids(), labels=answers(2))
    assert out.logits.shape == (2, 13, SIZES["vocab_size"])
    out.loss.backward()
    for name, weight in pair.named_parameters():
        # noise is read in training alone, and an expert may get no token
        if weight.grad is None or not weight.grad.any():
            assert name.endswith("gate.noise.weight") or "experts." in name, name
        assert weight.grad is None or weight.grad.isfinite().all(), name


@torch.no_grad()
def test_pair_no_later_token_is_seen_and_every_token_of_the_text_is(pair):
    x, written, cut = ids(), answers(2), 6
    other = written.clone()
    other[:, cut:] = (other[:, cut:] + 1) % SIZES["vocab_size"]
    one, two = (pair(x, decoder_input_ids=y).logits for y in (written, other))
    torch.testing.assert_close(one[:, :cut], two[:, :cut], **CLOSE)
    assert not torch.allclose(one[:, cut:], two[:, cut:], atol=1e-4)
    for place in (0, LENGTH - 1):
        read = x.clone()
        read[:, place] = (read[:, place] + 1) % SIZES["vocab_size"]
        assert not torch.allclose(pair(read, decoder_input_ids=written).logits[:, 0], one[:, 0], atol=1e-5)


@torch.no_grad()
def test_pair_a_padded_row_is_the_row_alone(pair):
    x, written, room = ids(1), answers(1), 5
    alone, filled = pair(x, decoder_input_ids=written).logits, torch.ones_like(x)
    zeros = torch.zeros(1, room, dtype=torch.long)
    for order in ((zeros, x), (x, zeros)):
        mask = torch.cat([torch.zeros_like(part) if part is zeros else filled for part in order], 1)
        padded = pair(torch.cat(order, 1), attention_mask=mask, decoder_input_ids=written).logits
        torch.testing.assert_close(padded, alone, **CLOSE)


@torch.no_grad()
def test_pair_cached_decoding_equals_the_full_pass(pair):
    x, written = ids(), answers(2)
    full, cache, parts, at = pair(x, decoder_input_ids=written).logits, None, [], 0
    for count in (4, 1, 1, 5, 2):
        out = pair(x, decoder_input_ids=written[:, at : at + count], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + count
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, **CLOSE)


def test_pair_save_and_load_is_exact(pair, tmp_path):
    save_model(pair, tmp_path)
    kept = load_model(tmp_path, kind=LlmctlForConditionalGeneration).state_dict()
    assert kept.keys() == pair.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in pair.state_dict().items())


@torch.no_grad()
def test_pair_the_planner_counts_what_there_is(pair):
    spec = pair.config.spec
    assert total_parameters(spec) == sum(weight.numel() for weight in pair.parameters())
    cache = pair(ids(), decoder_input_ids=answers(2), use_cache=True).past_key_values
    own = sum(state.own.nbytes for state in cache.states)
    assert own == 2 * kv_cache_bytes(spec, 13, 4)
