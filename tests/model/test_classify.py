"""A score head on the backbone: equal to transformers' class, both ways, and pooled where rows end."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmctl.errors import UserError
from llmctl.model import LlmctlForSequenceClassification
from llmctl.model.adapters import add_lora, narrow_frozen, save_adapter
from llmctl.model.checkpoint import load_model, load_weights, new_model, save_model
from llmctl.model.classify import from_language_model, open_or_begin, open_scorer
from llmctl.model.leaves import leaves
from llmctl.model.open import open_model
from llmctl.recipe.model import ModelSection
from tests.model.cases import CASES, SMALL, ids

SPEC = ModelSection(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
PAD = 0


def scorer(num_labels: int = 1, **settings) -> LlmctlForSequenceClassification:
    language = new_model(SPEC.model_copy(update=settings), seed=0, pad_token_id=PAD)
    model = from_language_model(language, seed=1, num_labels=num_labels)
    with torch.no_grad():
        for weight in model.parameters():  # large enough that a wrong token shows
            weight.mul_(4)
    return model


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 5, 3 and 4 real tokens, and their mask, [3, 5] each."""
    rows = torch.randint(3, 31, (3, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(rows)
    for row, blank in enumerate((0, 2, 1)):
        cut = slice(0, blank) if side == "left" else slice(5 - blank, 5)
        rows[row, cut], mask[row, cut] = PAD, 0
    return rows, mask


@torch.no_grad()
@pytest.mark.parametrize("num_labels", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "llama-tied-mha", "mistral-window", "qwen2", "qwen3"])
def test_ours_opens_in_transformers(tmp_path, name, num_labels):
    model_type, settings = CASES[name]
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings}, num_labels=num_labels)
    torch.manual_seed(0)
    given = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in given.parameters():
        weight.mul_(3)
    given.save_pretrained(tmp_path / "theirs")

    ours = load_model(tmp_path / "theirs", kind=LlmctlForSequenceClassification)
    assert ours.config.num_labels == num_labels
    save_model(ours, tmp_path / "ours")
    wrote = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert wrote["architectures"] == [type(given).__name__]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(given) and again.config.id2label == given.config.id2label

    x = ids(3, 9)
    x[1, 6:] = SMALL["pad_token_id"]
    mask = (x != SMALL["pad_token_id"]).long()
    want = given(x, attention_mask=mask).logits
    assert want.shape == (3, num_labels)
    for model in (ours, again):
        torch.testing.assert_close(model(x, attention_mask=mask).logits, want, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [PAD, None])
def test_the_last_real_token_is_read(side, pad):
    model = scorer()
    model.config.pad_token_id = pad
    rows, mask = padded(side)
    found = model(rows, attention_mask=mask).logits
    for row, real, got in zip(rows, mask.bool(), found, strict=True):
        torch.testing.assert_close(model(row[real][None]).logits[0], got, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_mask_the_pad_token_tells():
    model = scorer()
    rows, mask = padded("right")
    assert torch.equal(model(rows).logits, model(rows, attention_mask=mask).logits)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="neither an attention_mask nor a pad_token_id"):
        model(rows)
    assert model(rows[:1]).logits.shape == (1, 1)


def test_loss_is_that_of_transformers(tmp_path):
    model = scorer(num_labels=3)
    save_model(model, tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows, mask = padded("right")
    labels = torch.tensor([2, 0, 1])
    want = theirs(rows, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(model(rows, attention_mask=mask, labels=labels).loss, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_model_of_our_own_type_opens_by_auto_class(tmp_path):
    model = scorer(family="llmctl")
    save_model(model, tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is LlmctlForSequenceClassification and again.config.num_labels == 1
    x = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.eval()(x).logits, model(x).logits)


def test_a_new_head_comes_from_the_seed(tmp_path):
    language = new_model(SPEC, seed=0)
    save_model(language, tmp_path / "lm")
    one, same, other = (open_or_begin(tmp_path / "lm", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert torch.equal(one.model.embed_tokens.weight, language.model.embed_tokens.weight)
    assert one.config.num_labels == 1 and one.score.weight.shape == (1, 16)
    # a reward model goes on as it is, whatever the seed
    save_model(one, tmp_path / "rm")
    assert torch.equal(open_or_begin(tmp_path / "rm", seed=9).score.weight, one.score.weight)


def test_score_is_a_head_and_stays_as_precise_as_it_is():
    model = scorer()
    assert [leaf.name for leaf in leaves(model) if leaf.kind == "head"] == ["score"]
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
    add_lora(model, **lora, task="reward")
    narrow_frozen(model, torch.bfloat16)
    assert {weight.dtype for weight in model.score.parameters()} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32


def test_weights_are_read_back_in_place(tmp_path):
    model = scorer()
    save_model(model, tmp_path)
    other = scorer()
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    held = other.score.weight
    load_weights(other, tmp_path)
    assert other.score.weight is held and torch.equal(held, model.score.weight)


@torch.no_grad()
def test_an_adapter_of_a_reward_model_opens(tmp_path):
    save_model(new_model(SPEC, seed=0), tmp_path / "lm")
    tuned = add_lora(
        open_or_begin(tmp_path / "lm", seed=3),
        r=2,
        alpha=4,
        dropout=0.0,
        target_modules="all-linear",
        base=str(tmp_path / "lm"),
        task="reward",
    )
    for name, weight in tuned.named_parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    save_adapter(tuned, tmp_path / "run")
    x = torch.tensor([[5, 6, 7], [8, 9, 3]])
    mask = torch.ones_like(x)
    want = tuned.eval()(input_ids=x, attention_mask=mask).logits
    opened = open_scorer(tmp_path / "run")
    assert type(opened) is LlmctlForSequenceClassification
    torch.testing.assert_close(opened(x, attention_mask=mask).logits, want, atol=1e-5, rtol=1e-5)
    plain = open_or_begin(tmp_path / "lm", seed=3)(x, attention_mask=mask).logits
    assert (plain - want).abs().max() > 1e-2
    # and a further adapter finds it as its base
    further = add_lora(
        open_or_begin(tmp_path / "run", seed=0),
        r=2,
        alpha=4,
        dropout=0.0,
        target_modules="all-linear",
        base=str(tmp_path / "run"),
        task="reward",
    )
    save_adapter(further, tmp_path / "further")
    torch.testing.assert_close(
        open_scorer(tmp_path / "further")(x, attention_mask=mask).logits, want, atol=1e-5, rtol=1e-5
    )


def test_the_other_kind_of_model_is_named(tmp_path):
    save_model(new_model(SPEC, seed=0), tmp_path / "lm")
    save_model(scorer(), tmp_path / "rm")
    with pytest.raises(UserError) as caught:
        open_scorer(tmp_path / "lm")
    assert "lm: holds a language model (LlamaForCausalLM), not a reward model" in caught.value.message
    assert caught.value.hint == "`llmctl reward` makes a reward model of it"
    with pytest.raises(UserError) as caught:
        open_model(tmp_path / "rm")
    assert (
        "rm: holds a reward model (LlamaForSequenceClassification), not a language model"
        in caught.value.message
    )
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
    save_adapter(add_lora(new_model(SPEC, seed=0), **lora, base=str(tmp_path / "lm")), tmp_path / "sft")
    with pytest.raises(UserError) as caught:
        open_scorer(tmp_path / "sft")
    assert "sft: holds an adapter of a language model, not a reward model" in caught.value.message
    scored = add_lora(open_or_begin(tmp_path / "lm", 0), **lora, base=str(tmp_path / "lm"), task="reward")
    save_adapter(scored, tmp_path / "scored")
    with pytest.raises(UserError) as caught:
        open_model(tmp_path / "scored")
    assert "scored: holds an adapter of a reward model, not of a language model" in caught.value.message
    assert caught.value.hint == "`llmctl score` reads it; give a language model here"
