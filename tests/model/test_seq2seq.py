"""Encoder–decoders: against transformers' T5, and the contract over variants of both stacks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, DynamicCache, T5Config, T5ForConditionalGeneration

from llmctl.errors import UserError
from llmctl.model import LlmctlForConditionalGeneration, recompute_activations
from llmctl.model.adapters import add_lora
from llmctl.model.checkpoint import load_model, new_of_stack, save_model
from llmctl.model.families import read_config
from llmctl.model.leaves import leaves
from llmctl.model.vocabulary import grow_vocabulary
from llmctl.recipe.model import ModelSection
from tests.model.variants import SIZES, ids

BOUND = 1e-4
SMALL = {
    "vocab_size": SIZES["vocab_size"],
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    # so few that far distances share a bucket within a row
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "t5": {},
    "t5-one-depth": {"num_decoder_layers": None, "layer_norm_epsilon": 1e-3, "feed_forward_proj": "gelu"},
    "t5-v1.1": V11,
    "t5-gated-tied": {"feed_forward_proj": "gated-gelu"},
    "t5-gated-silu": {"feed_forward_proj": "gated-silu"},
}


def theirs(case: str) -> T5ForConditionalGeneration:
    """A T5 with random weights in which every part counts; logits reach 5 to 9."""
    model = T5ForConditionalGeneration(T5Config(**SMALL | CASES[case])).eval()
    if not CASES[case].get("tie_word_embeddings", True):
        # a new one of transformers 5 is tied whatever its config says; those that were trained are not
        model.all_tied_weights_keys.pop("lm_head.weight")
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 1.0 if "relative" in name or "shared" in name else 0.15)
            if "norm" in name:
                weight.add_(1)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and their mask [3, LENGTH], padded on either side."""
    x = ids(3).clamp(min=2)
    mask = torch.ones_like(x)
    mask[1, 9:], mask[2, :4] = 0, 0
    return x * mask, mask


def answers(rows: int = 3, length: int = 13) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(5))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, load_model(folder, kind=LlmctlForConditionalGeneration)


@torch.no_grad()
def test_logits_and_hidden_states_equal(pair):
    reference, ours = pair
    x, mask = rows()
    given = {"attention_mask": mask, "decoder_input_ids": answers(), "output_hidden_states": True}
    mine, expected = ours(x, **given), reference(x, **given)
    assert largest(mine.logits, expected.logits) <= BOUND
    assert expected.logits.abs().max() > 3
    real = mask.bool()
    assert largest(mine.encoder_last_hidden_state[real], expected.encoder_last_hidden_state[real]) <= BOUND
    for side in ("encoder_hidden_states", "decoder_hidden_states"):
        one, other = getattr(mine, side), getattr(expected, side)
        assert len(one) == len(other)
        places = real if side.startswith("encoder") else slice(None)
        assert all(largest(a[places], b[places]) <= BOUND for a, b in zip(one, other, strict=True))
    unmasked = {"decoder_input_ids": answers()}
    assert largest(ours(x, **unmasked).logits, reference(x, **unmasked).logits) <= BOUND


@torch.no_grad()
def test_padded_rows_equal_single_ones(pair):
    """Padding of the text, and of what is written, on either side."""
    reference, ours = pair
    x, mask = rows()
    written, shown = answers(), torch.ones_like(answers())
    shown[0, 10:], shown[1, :3] = 0, 0
    together = ours(x, attention_mask=mask, decoder_input_ids=written, decoder_attention_mask=shown).logits
    for row in range(3):
        real, seen = mask[row].bool(), shown[row].bool()
        alone = reference(x[row, real][None], decoder_input_ids=written[row, seen][None]).logits[0]
        assert largest(together[row, seen], alone) <= BOUND


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_generate_equals_transformers(pair, how):
    reference, ours = pair
    x, mask = rows()
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, **how}
    settings["no_repeat_ngram_size"] = 1  # random weights like to say the same for ever
    expected = reference.generate(x, attention_mask=mask, **settings)
    found = ours.generate(x, attention_mask=mask, **settings)
    assert torch.equal(found, expected)
    assert found.shape[1] == 33 and len(set(found[0].tolist())) == 33


@torch.no_grad()
def test_a_cache_is_handed_back_and_goes_on(pair):
    reference, ours = pair
    x, mask = rows()
    written = answers()
    full = reference(x, attention_mask=mask, decoder_input_ids=written).logits
    read = ours.get_encoder()(input_ids=x, attention_mask=mask)
    cache, parts, at = None, [], 0
    for count in (3, 1, 5, 4):
        out = ours(
            encoder_outputs=read,
            attention_mask=mask,
            decoder_input_ids=written[:, at : at + count],
            past_key_values=cache,
            use_cache=True,
        )
        cache, at = out.past_key_values, at + count
        parts.append(out.logits)
    assert cache.get_seq_length() == written.shape[1]
    assert largest(torch.cat(parts, 1), full) <= BOUND


def test_labels_are_shifted_and_gradients_equal(pair):
    reference, ours = pair
    x, mask = rows()
    labels = answers()
    labels[1, 8:] = -100
    mine = ours(x, attention_mask=mask, labels=labels)
    expected = reference(x, attention_mask=mask, labels=labels)
    assert largest(mine.logits, expected.logits) <= BOUND
    assert largest(mine.loss, expected.loss) <= BOUND
    reference.zero_grad(), ours.zero_grad()
    mine.loss.backward(), expected.loss.backward()
    theirs_last = reference.decoder.block[-1].layer[1].EncDecAttention
    ours_last = ours.model.decoder.layers[-1].cross_attn
    for one, other in (
        (ours_last.k_proj.weight, theirs_last.k.weight),
        (
            ours.model.encoder.positions.weight,
            reference.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        ),
        (
            ours.model.decoder.positions.weight,
            reference.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        ),
        (ours.model.embed_tokens.weight, reference.shared.weight),
        (ours.lm_head.weight, reference.lm_head.weight),
        (ours.model.encoder.norm.weight, reference.encoder.final_layer_norm.weight),
    ):
        scale = float(other.grad.abs().max().clamp(min=1))
        assert largest(one.grad, other.grad) <= 5 * BOUND * scale
    half = ours(x, attention_mask=mask, labels=labels, num_items_in_batch=2 * (labels != -100).sum()).loss
    assert largest(2 * half, expected.loss) <= BOUND


@torch.no_grad()
def test_what_we_save_opens_in_transformers(pair, tmp_path):
    reference, ours = pair
    save_model(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    opened, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is type(reference) and not any(report.values())
    assert opened.generation_config.decoder_start_token_id == 0
    assert opened.config.scale_decoder_outputs == reference.config.scale_decoder_outputs
    x, mask = rows()
    given = {"attention_mask": mask, "labels": answers()}
    expected = reference(x, **given).logits
    again = load_model(tmp_path, kind=LlmctlForConditionalGeneration)
    for model in (opened, again):
        assert largest(model(x, **given).logits, expected) <= BOUND
    assert again.config.spec == ours.config.spec


@torch.no_grad()
def test_lora_on_every_matrix_starts_as_the_base_and_trains(pair):
    _, ours = pair
    spec, state = ours.config.spec, ours.state_dict()
    model = new_of_stack(spec, seed=0, decoder_start_token_id=0)
    model.load_state_dict(state)
    adapted = add_lora(model.eval(), r=4, alpha=8, dropout=0.0, target_modules="all-linear", task="seq2seq")
    given = {"input_ids": ids(2), "labels": answers(2)}
    assert largest(adapted(**given).logits, ours(**given).logits) <= BOUND
    inner = len(list(leaves(ours))) - 1  # all but the head
    with torch.enable_grad():
        adapted(**given).loss.backward()
    trained = [name for name, weight in adapted.named_parameters() if weight.grad is not None]
    assert len(trained) == 2 * inner and all(".lora_" in name for name in trained)
    assert any(".encoder." in name for name in trained) and any(".cross_attn." in name for name in trained)
    found = adapted.generate(input_ids=ids(2), max_new_tokens=4, eos_token_id=None)
    assert found.shape == (2, 5)


REFUSED = {
    "is_decoder: True": {"is_decoder": True},
    "feed_forward_proj: gated-relu": {"feed_forward_proj": "gated-relu"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_configs_we_cannot_express_are_refused(message):
    with pytest.raises(UserError) as caught:
        read_config({"model_type": "t5", **SMALL, **REFUSED[message]}, "m/config.json")
    assert message in caught.value.message


T5_SPEC = {
    "stack": "encoder_decoder",
    "position": "relative",
    "query_pre_attn_scalar": 1.0,
    "ffn": "geglu",
    "tie_word_embeddings": False,
}
IDS = {"pad_token_id": 0, "decoder_start_token_id": 1}
NEW = {
    "t5": {},
    "llmctl": {"tie_word_embeddings": True},  # a tied head of T5 is scaled
}


@torch.no_grad()
@pytest.mark.parametrize("family", NEW)
def test_a_new_one_is_saved_as_the_family_that_expresses_it(family, tmp_path):
    model = new_of_stack(ModelSection(**SIZES, **(T5_SPEC | NEW[family])), 3, **IDS).eval()
    assert isinstance(model, LlmctlForConditionalGeneration)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    given = {"input_ids": ids(), "labels": answers(2)}
    for opened in (
        load_model(tmp_path, kind=LlmctlForConditionalGeneration),
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path),
    ):
        assert largest(opened(**given).logits, model(**given).logits) <= BOUND
        assert opened.generation_config.decoder_start_token_id == 1


# --- what it is not, and passes over it -----------------------------------------------------------------


def small(**more: object) -> LlmctlForConditionalGeneration:
    spec = ModelSection(**SIZES, stack="encoder_decoder", num_decoder_layers=1)
    return new_of_stack(spec, 0, **{"pad_token_id": 0, "decoder_start_token_id": 0, **more})


def test_leaves_are_all_matrices_of_both_stacks():
    found = {leaf.name for leaf in leaves(small())}
    assert len(found) == 2 * 7 + (7 + 4) + 1
    assert {
        "model.encoder.layers.1.mlp.up_proj",
        "model.decoder.layers.0.cross_attn.k_proj",
        "lm_head",
    } <= found


def test_the_table_belongs_to_both_stacks_and_grows_once():
    model = small()
    assert sum(name.endswith("embed_tokens.weight") for name in model.state_dict()) == 1
    grow_vocabulary(model, SIZES["vocab_size"] + 3)
    out = model(ids(), decoder_input_ids=answers(2))
    assert out.logits.shape[-1] == SIZES["vocab_size"] + 3


def test_recomputed_activations_give_the_same_gradients():
    plain, lean = small(), small()
    recompute_activations(lean)
    for model in (plain, lean):
        model.train()
        model(ids(), labels=answers(2), use_cache=True).loss.backward()
    for one, other in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert lean(ids(), labels=answers(2), use_cache=True).past_key_values is None


MISUSED = {
    "give exactly one of input_ids and inputs_embeds": {"labels": answers(2)},
    "give decoder_input_ids, or labels to make them from": {"input_ids": ids()},
    "output_attentions is not available": {
        "input_ids": ids(),
        "labels": answers(2),
        "output_attentions": True,
    },
    "DynamicCache cannot hold what an encoder–decoder remembers": {
        "input_ids": ids(),
        "labels": answers(2),
        "past_key_values": DynamicCache(),
    },
}


@pytest.mark.parametrize("message", MISUSED)
def test_misuse_is_told(message):
    with pytest.raises(ValueError, match=message):
        small()(**MISUSED[message])


def test_without_a_token_to_begin_with_labels_are_not_enough():
    with pytest.raises(ValueError, match="neither a decoder_start_token_id nor a bos_token_id"):
        small(decoder_start_token_id=None)(ids(), labels=answers(2))


def test_it_is_no_language_model(tmp_path):
    theirs("t5").save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert caught.value.message == (
        f"{tmp_path}: holds an encoder–decoder (T5ForConditionalGeneration), not a language model"
    )
    assert (
        caught.value.hint == "in Python, LlmctlForConditionalGeneration opens it; give a language model here"
    )
