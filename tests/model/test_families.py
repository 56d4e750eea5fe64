"""Our core against transformers' own classes: the oracle is theirs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmctl.errors import UserError
from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.context import plain_context
from llmctl.model.families import FAMILIES, config_in, write_config
from llmctl.recipe.model import ModelSection
from tests.model.cases import CASES, SMALL, ids, theirs

LENGTH = 33  # more than three windows of 8
BOUND = 1e-4


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; the logits of these models reach 5 to 6."""
    return float((a - b).detach().abs().max())


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, load_model(folder)


@torch.no_grad()
def test_logits_equal(pair):
    reference, ours = pair
    x = ids(2, LENGTH)
    assert largest(ours(x).logits, reference(x).logits) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_rows(pair, side):
    reference, ours = pair
    x, mask = ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for row, padding in enumerate((0, 5, 20)):
        places = slice(0, padding) if side == "left" else slice(LENGTH - padding, LENGTH)
        mask[row, places] = 0
        x[row, places] = 0
    together = ours(x, attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        assert largest(together[row, real], reference(x[row, real][None]).logits[0]) <= BOUND


@torch.no_grad()
def test_packed_row_equals_separate_documents(pair):
    reference, ours = pair
    lengths = [13, 1, LENGTH - 14]
    x = ids(2, LENGTH)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    packed = ours(x, position_ids=positions).logits
    for row in range(2):
        alone = [reference(part[None]).logits[0] for part in x[row].split(lengths)]
        assert largest(packed[row], torch.cat(alone)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_packed_at_once(pair, side):
    """Positions that restart keep documents apart under a padding mask too."""
    reference, ours = pair
    lengths, padding = [13, LENGTH - 13], 5
    x, zeros = ids(2, LENGTH), torch.zeros(2, padding, dtype=torch.long)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    real = torch.ones_like(x)
    padded = [
        torch.cat((zeros, part) if side == "left" else (part, zeros), 1) for part in (x, positions, real)
    ]
    logits = ours(padded[0], position_ids=padded[1], attention_mask=padded[2]).logits
    logits = logits[:, padding:] if side == "left" else logits[:, :-padding]
    for row in range(2):
        alone = [reference(part[None]).logits[0] for part in x[row].split(lengths)]
        assert largest(logits[row], torch.cat(alone)) <= BOUND


@torch.no_grad()
def test_cached_decoding_equals_full_forward(pair):
    reference, ours = pair
    x = ids(2, LENGTH)
    full = reference(x).logits
    cache, parts, at = None, [], 0
    for count in (7, 1, 9, 1, LENGTH - 18):
        out = ours(x[:, at : at + count], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + count
        parts.append(out.logits)
    assert largest(torch.cat(parts, 1), full) <= BOUND


def test_generate_equals_transformers(pair):
    """Rows padded on the left continue as each does alone (transformers' Mamba-2 is wrong on padded ones)."""
    reference, ours = pair
    x, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    x[1, :4], mask[1, :4] = 0, 0
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = ours.generate(x, attention_mask=mask, **settings)
    for row in range(2):
        alone = x[row, mask[row].bool()][None]
        expected = reference.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(found[row, -32:], expected[0, -32:])


@torch.no_grad()
def test_what_we_save_opens_in_transformers(pair, tmp_path):
    reference, ours = pair
    save_model(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == reference.config.architectures or config["architectures"] == [
        type(reference).__name__
    ]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(opened) is type(reference)
    x = ids(2, LENGTH)
    assert largest(opened(x).logits, ours(x).logits) <= BOUND


@torch.no_grad()
def test_embeddings_in_the_place_of_ids(pair):
    """They are what the model's own embedding layer gives, as PEFT and TRL make them."""
    _, ours = pair
    x = ids(2, LENGTH)
    assert torch.equal(ours(inputs_embeds=ours.get_input_embeddings()(x)).logits, ours(x).logits)


def test_gradients_equal(pair, tmp_path):
    """Theirs are saved and read as a model is, since their parameters need not be ours one by one."""
    reference, ours = pair
    x = ids(2, LENGTH)
    reference.zero_grad(), ours.zero_grad()
    reference(x, labels=x).loss.backward()
    ours(x, labels=x, skip_logits=True).loss.backward()
    holder = copy.deepcopy(reference)
    for weight, source in zip(holder.parameters(), reference.parameters(), strict=True):
        weight.data = torch.zeros_like(source) if source.grad is None else source.grad.clone()
    holder.save_pretrained(tmp_path)
    expected = dict(load_model(tmp_path).named_parameters())
    for name, weight in ours.named_parameters():
        scale = float(expected[name].detach().abs().max().clamp(min=1))
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert largest(found, expected[name]) <= 5 * BOUND * scale, name


GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "ffn": "gelu_tanh",
    "attention_bias": "all",
    "mlp_bias": True,
    "num_key_value_heads": 4,
}
SPECS = {
    "llama": {},
    "mistral": {"pattern": ["sliding"], "sliding_window": 16},
    "qwen2": {"attention_bias": "qkv", "pattern": ["full", "sliding"], "sliding_window": 16},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "gpt2": GPT2,
    "gemma2": {
        "norm": "rmsnorm1p",
        "norm_placement": "sandwich",
        "ffn": "geglu",
        "embedding_multiplier": 8.0,
        "attn_logit_softcapping": 20.0,
        "pattern": ["sliding", "full"],
        "sliding_window": 16,
    },
    "mixtral": {"experts": {"kind": "sparse", "num_experts": 4}},
    "qwen3_moe": {
        "qk_norm": True,
        "experts": {
            "kind": "sparse",
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.001,
        },
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "attention": "mla",
        "mla": {"q_lora_rank": 20, "kv_lora_rank": 28, "qk_rope_head_dim": 8},
        "experts": {
            "kind": "sparse",
            "num_experts": 4,
            "n_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "scoring_func": "sigmoid",
            "correction_bias": True,
            "bias_update_rate": 0.01,
        },
    },
    "mamba2": {
        "pattern": ["mamba2"],
        "position": "none",
        "ffn": "none",
        "ssm": {"state_size": 12, "head_dim": 16, "n_groups": 2},
    },
    "llmctl": {"pattern": ["full", "sliding"], "sliding_window": 16},
}


@torch.no_grad()
def test_gemma_rounds_the_scale_of_its_embeddings(tmp_path):
    """√60 is 7.746, in bfloat16 7.75: equal to the bit, which few of them would be otherwise."""
    reference = theirs("gemma2").bfloat16()
    reference.save_pretrained(tmp_path)
    ours, x = load_model(tmp_path), ids(2, LENGTH)
    embedded = ours.model.embed(x, plain_context(LENGTH))
    assert embedded.dtype == torch.bfloat16
    assert torch.equal(embedded, reference.model.embed_tokens(x))


@torch.no_grad()
@pytest.mark.parametrize("family", SPECS)
def test_a_new_model_is_saved_as_the_family_that_expresses_it(family, tmp_path):
    sizes = {key: SMALL[key] for key in ModelSection.model_fields if key in SMALL}
    model = new_model(ModelSection(**(sizes | SPECS[family])), seed=3, eos_token_id=[2, 5]).eval()
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    x = ids(2, LENGTH)
    for opened in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert largest(opened(x).logits, model(x).logits) <= BOUND
        assert opened.generation_config.eos_token_id == [2, 5]
    again = config_in(tmp_path)
    assert write_config(again) == write_config(model.config)
    assert again.spec.experts == model.config.spec.experts
    assert again.spec.max_position_embeddings == SMALL["max_position_embeddings"]
    if family in FAMILIES and FAMILIES[family].rules(again.spec):
        with pytest.raises(UserError, match=f"cannot reshape the tensors of `{family}`"):
            LlmctlForCausalLM.from_pretrained(tmp_path)
    else:
        assert isinstance(LlmctlForCausalLM.from_pretrained(tmp_path), LlmctlForCausalLM)
