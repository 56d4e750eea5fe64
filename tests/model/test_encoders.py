"""Encoders: against transformers' BERT and RoBERTa, the contract over every variant, and what commands say of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from llmctl.errors import UserError
from llmctl.model import LlmctlForMaskedLM, LlmctlForSequenceClassification, LlmctlModel
from llmctl.model.checkpoint import load_model, new_of_stack, save_model
from llmctl.model.embedding import embed
from llmctl.model.families import read_config, write_config
from llmctl.model.leaves import leaves
from llmctl.model.vocabulary import grow_vocabulary
from llmctl.recipe.model import ModelSection
from tests.model.variants import LENGTH, SIZES, ids

SMALL = {
    "vocab_size": SIZES["vocab_size"],
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
CASES = {
    "bert": ("bert", {"pad_token_id": 0}),
    "bert-tanh-gelu": ("bert", {"pad_token_id": 0, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    "bert-relu": ("bert", {"pad_token_id": 0, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "bert-untied": ("bert", {"pad_token_id": 0, "tie_word_embeddings": False}),
    "roberta": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "roberta-untied": ("roberta", {"pad_token_id": 1, "tie_word_embeddings": False}),
    "roberta-late-padding": ("roberta", {"pad_token_id": 3, "type_vocab_size": 2}),
}
BOUND = 1e-4


def theirs(case: str, auto: type = AutoModelForMaskedLM, **more: object) -> torch.nn.Module:
    """A transformers model with random weights, biases and norms, so large that logits reach 4 to 6."""
    model_type, settings = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings, **more})
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            weight.mul_(3.0)
    return model


def rows(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and types [4, LENGTH], padded on the right."""
    pad, kinds = CASES[case][1]["pad_token_id"], CASES[case][1].get("type_vocab_size", 2)
    x = ids(4).clamp(min=4)
    mask = torch.ones_like(x)
    for row, length in enumerate((LENGTH, 1, 7, LENGTH - 1)):
        x[row, length:], mask[row, length:] = pad, 0
    return x, mask, torch.arange(LENGTH).expand(4, -1) * kinds // LENGTH


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = theirs(request.param)
    model.save_pretrained(folder)
    return request.param, model, load_model(folder, kind=LlmctlForMaskedLM), folder


@torch.no_grad()
def test_logits_and_hidden_states_equal(pair):
    case, reference, ours, _ = pair
    x, mask, types = rows(case)
    given = {"attention_mask": mask, "token_type_ids": types, "output_hidden_states": True}
    mine, expected = ours(x, **given), reference(x, **given)
    real = mask.bool()
    assert largest(mine.logits[real], expected.logits[real]) <= BOUND
    assert len(mine.hidden_states) == len(expected.hidden_states) == SMALL["num_hidden_layers"] + 1
    for one, other in zip(mine.hidden_states, expected.hidden_states, strict=True):
        assert largest(one[real], other[real]) <= BOUND
    assert largest(ours(x[:1]).logits, reference(x[:1]).logits) <= BOUND


@torch.no_grad()
def test_types_of_tokens_are_told_apart(pair):
    case, _, ours, _ = pair
    x, _, types = rows(case)
    if types.any():
        assert largest(ours(x).logits, ours(x, token_type_ids=types).logits) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_ones(pair, side):
    case, reference, ours, _ = pair
    x, mask, _ = rows(case)
    if side == "left":
        lengths = mask.sum(1)
        x, mask = (
            torch.stack([row.roll(LENGTH - int(n)) for row, n in zip(value, lengths, strict=True)])
            for value in (x, mask)
        )
    together = ours(x, attention_mask=mask).logits
    for row in range(4):
        real = mask[row].bool()
        assert largest(together[row, real], reference(x[row, real][None]).logits[0]) <= BOUND


def test_loss_and_gradients_equal(pair):
    case, reference, ours, _ = pair
    x, mask, _ = rows(case)
    labels = torch.where((torch.arange(LENGTH) % 3 == 1) & (mask == 1), x, -100)
    reference.zero_grad(), ours.zero_grad()
    expected = reference(x, attention_mask=mask, labels=labels).loss
    loss = ours(x, attention_mask=mask, labels=labels).loss
    assert largest(loss, expected) <= BOUND
    expected.backward(), loss.backward()
    half = ours(x, attention_mask=mask, labels=labels, num_items_in_batch=2 * (labels != -100).sum()).loss
    assert largest(2 * half, expected) <= BOUND
    body = reference.base_model.encoder.layer[1]
    found = ours.model.layers[1]
    for mine, other in (
        (found.self_attn.k_proj.weight, body.attention.self.key.weight),
        (found.input_layernorm.weight, body.attention.output.LayerNorm.weight),
        (ours.model.embed_tokens.weight, reference.get_input_embeddings().weight),
    ):
        # the padding row is trained in ours alone, where a row of real tokens holds none of it
        scale = float(other.grad.abs().max().clamp(min=1))
        assert largest(mine.grad, other.grad) <= 5 * BOUND * scale


@torch.no_grad()
def test_what_we_save_opens_in_transformers(pair, tmp_path):
    case, reference, ours, _ = pair
    save_model(ours, tmp_path)
    opened, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is type(reference)
    # an untied head has a second bias there, which nothing reads
    unread = {"cls.predictions.bias", "lm_head.bias"} if case.endswith("untied") else set()
    assert report.pop("missing_keys") <= unread and not any(report.values())
    x, mask, types = rows(case)
    given = {"attention_mask": mask, "token_type_ids": types}
    real = mask.bool()
    assert largest(opened(x, **given).logits[real], reference(x, **given).logits[real]) <= BOUND
    for name, value in reference.config.to_dict().items():
        if name not in ("dtype", "transformers_version", "_name_or_path"):
            assert getattr(opened.config, name) == value, name


@torch.no_grad()
@pytest.mark.parametrize("pooler", [False, True])
def test_a_backbone_both_ways(pair, pooler, tmp_path):
    """From a masked language model and from a file of a backbone; its pooler is left, for nothing reads it."""
    case, _, _, folder = pair
    backbone = theirs(case, AutoModel, add_pooling_layer=True) if pooler else None
    if backbone is not None:
        backbone.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs" if pooler else folder, kind=LlmctlModel)
    reference = backbone or AutoModelForMaskedLM.from_pretrained(folder).base_model
    x, mask, types = rows(case)
    given = {"attention_mask": mask, "token_type_ids": types}
    real, expected = mask.bool(), reference(x, **given).last_hidden_state
    save_model(ours, tmp_path / "ours")
    again = load_model(tmp_path / "ours", kind=LlmctlModel)
    opened = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(opened) is type(reference)
    for model in (ours, again, opened):
        assert largest(model(x, **given).last_hidden_state[real], expected[real]) <= BOUND


@torch.no_grad()
def test_embeddings_are_means_over_real_tokens(pair):
    case, reference, _, folder = pair
    x, mask, types = rows(case)
    backbone = load_model(folder, kind=LlmctlModel)
    hidden = reference.base_model(x, attention_mask=mask, token_type_ids=types).last_hidden_state
    expected = torch.stack([row[real.bool()].mean(0) for row, real in zip(hidden, mask, strict=True)])
    found = embed(backbone, x, mask, types)
    assert largest(found, expected) <= BOUND
    unit = embed(backbone, x, mask, types, normalize=True)
    assert largest(unit, torch.nn.functional.normalize(expected, dim=-1)) <= BOUND
    # and a row alone, without a mask, is the row in a batch
    assert largest(embed(backbone, x[2:3, :7], None, types[2:3, :7]), expected[2:3]) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llmctl"])
def test_a_decoder_makes_embeddings_too(family, tmp_path):
    model = new_of_stack(ModelSection(**SIZES, family=family), seed=2).eval()
    save_model(model, tmp_path / "whole")
    backbone = load_model(tmp_path / "whole", kind=LlmctlModel)
    save_model(backbone, tmp_path / "backbone")
    expected = model.model(ids()).last_hidden_state.mean(1)
    for one in (backbone, load_model(tmp_path / "backbone", kind=LlmctlModel)):
        assert largest(embed(one, ids()), expected) <= BOUND
    with pytest.raises(UserError, match="holds a backbone without a head"):
        load_model(tmp_path / "backbone")


@torch.no_grad()
@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_classifiers_both_ways(case, tmp_path):
    reference = theirs(
        case, AutoModelForSequenceClassification, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
    )
    reference.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", kind=LlmctlForSequenceClassification)
    x, mask, types = rows(case)
    given = {"attention_mask": mask, "token_type_ids": types, "labels": torch.tensor([2, 0, 1, 2])}
    expected = reference(x, **given)
    save_model(ours, tmp_path / "ours")
    opened, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(opened) is type(reference) and not any(report.values())
    assert opened.config.id2label == {0: "a", 1: "b", 2: "c"}
    for model in (ours, opened, load_model(tmp_path / "ours", kind=LlmctlForSequenceClassification)):
        assert largest(model(x, **given).logits, expected.logits) <= BOUND
        assert largest(model(x, **given).loss, expected.loss) <= BOUND


@torch.no_grad()
def test_names_of_old_files_are_read(tmp_path):
    """As google-bert/bert-base-uncased holds them: gamma and beta, heads for two tasks, every tied copy."""
    reference = theirs("bert")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    width = SMALL["hidden_size"]
    old |= {
        "cls.predictions.decoder.weight": old["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": old["cls.predictions.bias"].clone(),
        "cls.seq_relationship.weight": torch.zeros(2, width),
        "cls.seq_relationship.bias": torch.zeros(2),
        "bert.pooler.dense.weight": torch.zeros(width, width),
        "bert.pooler.dense.bias": torch.zeros(width),
        "bert.embeddings.position_ids": torch.arange(40)[None],
    }
    save_file(old, tmp_path / "model.safetensors")
    ours = load_model(tmp_path, kind=LlmctlForMaskedLM)
    assert largest(ours(ids()).logits, reference(ids()).logits) <= BOUND


REFUSED = {
    "is_decoder: True": {"model_type": "bert", "is_decoder": True},
    "hidden_act: silu": {"model_type": "bert", "hidden_act": "silu"},
    "hidden_act: relu": {"model_type": "roberta", "hidden_act": "relu"},
    "position_embedding_type: relative_key": {
        "model_type": "bert",
        "position_embedding_type": "relative_key",
    },
    "classifier_dropout: 0.3": {"model_type": "bert", "classifier_dropout": 0.3},
    "pad_token_id: None": {"model_type": "roberta", "pad_token_id": None},
}


@pytest.mark.parametrize("message", REFUSED)
def test_configs_we_cannot_express_are_refused(message):
    with pytest.raises(UserError) as caught:
        read_config({**SMALL, **REFUSED[message]}, "m/config.json")
    assert message in caught.value.message


def test_dropout_is_translated_and_only_for_training(tmp_path):
    model = theirs("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path, kind=LlmctlForMaskedLM)
    spec = ours.config.spec
    assert (spec.hidden_dropout, spec.attention_dropout) == (0.2, 0.3)
    x = ids()
    with torch.no_grad():
        assert torch.equal(ours(x).logits, ours(x).logits)
        ours.train()
        assert not torch.equal(ours(x).logits, ours(x).logits)
    name, fields = write_config(ours.config)
    assert name == "bert"
    assert (fields["hidden_dropout_prob"], fields["attention_probs_dropout_prob"]) == (0.2, 0.3)


NEW = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1, "position_offset": 2},
    # what RoBERTa's position table is counted from must be its padding
    "llmctl": {"type_vocab_size": 1, "position_offset": 3},
}
LIKE_BERT = {
    "stack": "encoder",
    "norm": "layernorm",
    "norm_placement": "post",
    "embedding_norm": True,
    "position": "learned",
    "attention_bias": "all",
    "mlp_bias": True,
    "ffn": "gelu",
}


@torch.no_grad()
@pytest.mark.parametrize("family", NEW)
def test_a_new_encoder_is_saved_as_the_family_that_expresses_it(family, tmp_path):
    spec = ModelSection(**SIZES, **LIKE_BERT, **NEW[family])
    model = new_of_stack(spec, seed=3, pad_token_id=1).eval()
    assert isinstance(model, LlmctlForMaskedLM)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    x = ids().clamp(min=2)  # RoBERTa's positions leave out what looks like padding
    for opened in (
        load_model(tmp_path, kind=LlmctlForMaskedLM),
        AutoModelForMaskedLM.from_pretrained(tmp_path),
    ):
        assert largest(opened(x).logits, model(x).logits) <= BOUND


# --- what an encoder is not ---------------------------------------------------------------------------


def test_an_encoder_has_no_cache_and_writes_nothing():
    model = new_of_stack(ModelSection(**SIZES, stack="encoder"), seed=0)
    assert not model.can_generate()
    with pytest.raises(ValueError, match="an encoder reads all tokens at once and has no cache"):
        model(ids(), use_cache=True)
    with pytest.raises(ValueError, match="LlmctlForCausalLM does not go with stack: encoder"):
        AutoModelForCausalLM.from_config(model.config)


@pytest.mark.parametrize(
    ("auto", "held"),
    [
        (AutoModelForMaskedLM, "a masked language model (BertForMaskedLM)"),
        (AutoModel, "a backbone without a head (BertModel)"),
        (AutoModelForSequenceClassification, "a reward model (BertForSequenceClassification)"),
    ],
)
def test_no_language_model_is_opened_from_an_encoder(auto, held, tmp_path):
    theirs("bert", auto).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert caught.value.message == f"{tmp_path}: holds {held}, not a language model"


def test_an_encoder_without_a_known_head_is_called_an_encoder(tmp_path):
    theirs("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert caught.value.message == f"{tmp_path}: holds an encoder, not a language model"
    assert caught.value.hint == "an encoder reads both ways and writes nothing; give a language model here"


@torch.no_grad()
def test_a_vocabulary_grows_with_its_bias():
    model = new_of_stack(ModelSection(**SIZES, **LIKE_BERT), seed=0)
    grow_vocabulary(model, SIZES["vocab_size"] + 3)
    assert model(ids()).logits.shape[-1] == len(model.lm_head.bias) == SIZES["vocab_size"] + 3


def test_passes_reach_every_matrix():
    model = new_of_stack(ModelSection(**SIZES, **LIKE_BERT), seed=0)
    found = {leaf.name: leaf.kind for leaf in leaves(model)}
    assert found["transform.dense"] == "linear" and found["lm_head"] == "head"
    assert sum(name.startswith("model.layers.") for name in found) == 6 * SIZES["num_hidden_layers"]
