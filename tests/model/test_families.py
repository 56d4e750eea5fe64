"""Our core against transformers' own classes: the oracle is theirs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmctl.errors import UserError, one_of
from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import FAMILIES, read_config, write_config
from llmctl.recipe.model import ModelSection
from tests.model.cases import CASES, SMALL, ids, theirs

LENGTH = 33  # more than three windows of 8
BOUND = 1e-4


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; the logits of these models reach 5 to 6."""
    return float((a - b).abs().max())


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
    reference, ours = pair
    x, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    x[1, :4], mask[1, :4] = 0, 0
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(x, attention_mask=mask, **settings)
    assert torch.equal(ours.generate(x, attention_mask=mask, **settings), expected)


@torch.no_grad()
def test_what_we_save_opens_in_transformers(pair, tmp_path):
    reference, ours = pair
    save_model(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == reference.config.architectures or config["architectures"] == [
        type(reference).__name__
    ]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(reference)
    x = ids(2, LENGTH)
    assert largest(opened(x).logits, ours(x).logits) <= BOUND


def test_gradients_equal(pair):
    reference, ours = pair
    x = ids(2, LENGTH)
    reference.zero_grad(), ours.zero_grad()
    reference(x, labels=x).loss.backward()
    ours(x, labels=x, skip_logits=True).loss.backward()
    expected = dict(reference.named_parameters())
    for name, weight in ours.named_parameters():
        scale = float(expected[name].grad.abs().max().clamp(min=1))
        assert largest(weight.grad, expected[name].grad) <= 5 * BOUND * scale, name


SPECS = {
    "llama": {},
    "mistral": {"pattern": ["sliding"], "sliding_window": 16},
    "qwen2": {"attention_bias": "qkv", "pattern": ["full", "sliding"], "sliding_window": 16},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "llmctl": {"pattern": ["full", "sliding"], "sliding_window": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("family", SPECS)
def test_a_new_model_is_saved_as_the_family_that_expresses_it(family, tmp_path):
    sizes = {key: SMALL[key] for key in ModelSection.model_fields if key in SMALL}
    model = new_model(ModelSection(**sizes, **SPECS[family]), seed=3, eos_token_id=[2, 5]).eval()
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    x = ids(2, LENGTH)
    for opened in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert largest(opened(x).logits, model(x).logits) <= BOUND
        assert opened.generation_config.eos_token_id == [2, 5]
    assert isinstance(LlmctlForCausalLM.from_pretrained(tmp_path), LlmctlForCausalLM)


def test_every_family_has_cases():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


def test_a_window_no_layer_uses_is_not_saved_for_all():
    spec = ModelSection(vocab_size=97, num_hidden_layers=1, pattern=["full", "sliding"], sliding_window=4)
    name, fields = write_config(LlmctlConfig.of(spec.model_copy(update={"family": "mistral"})))
    assert name == "mistral" and fields.get("sliding_window") is None
    assert read_config(fields, "x").spec.pattern == ["full"]


REFUSED = {
    "unsupported architecture `falcon`": {"model_type": "falcon"},
    "no model_type": {"hidden_size": 8},
    "hidden_act: gelu": {"model_type": "llama", **SMALL, "hidden_act": "gelu"},
    "rope_type: dynamic (supported: default, linear, ntk, yarn, llama3)": {
        "model_type": "llama",
        **SMALL,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_configs_we_cannot_express_are_refused(message):
    with pytest.raises(UserError) as caught:
        read_config(dict(REFUSED[message]), "m/config.json")
    assert message in caught.value.message
    assert caught.value.message.startswith("m/config.json: ")


def test_unsupported_architecture_lists_the_supported():
    with pytest.raises(UserError) as caught:
        read_config({"model_type": "gpt_neo"}, "x")
    assert caught.value.hint == f"supported: {one_of([*FAMILIES, 'llmctl'])}"


def test_a_named_family_that_cannot_express_the_model_is_an_error():
    config = LlmctlConfig.of(ModelSection(vocab_size=97, qk_norm=True, family="llama"))
    with pytest.raises(UserError) as caught:
        write_config(config)
    assert caught.value.message == "model.family: `llama` cannot express qk_norm: True"
