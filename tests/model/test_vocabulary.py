"""A larger vocabulary: old tokens keep their logits, new ones begin in the middle, nothing comes apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.classify import from_language_model
from llmctl.model.vocabulary import grow_vocabulary, resize_vocabulary, tie, untie
from tests.model.adapted import ROWS, base, ids, logits, spec

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_tokens_keep_their_logits(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base(tmp_path / "b", tied)
    model, before = load_model(tmp_path / "b", dtype), load_model(tmp_path / "b", dtype)
    grow_vocabulary(model, ROWS + 3)
    assert torch.equal(logits(model)[..., :ROWS], logits(before))
    assert model.dtype == dtype and not model.training
    for table, old in (
        (model.model.embed_tokens, before.model.embed_tokens),
        (model.lm_head, before.lm_head),
    ):
        assert table.weight.shape == (ROWS + 3, 16)
        mean = old.weight.float().mean(0).to(dtype)
        assert all(torch.equal(row, mean) for row in table.weight[ROWS:])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.lm_head.out_features == ROWS + 3


@TIED
def test_new_tokens_can_be_read_and_trained(tied: bool, tmp_path: Path) -> None:
    model = load_model(base(tmp_path / "b", tied))
    grow_vocabulary(model, ROWS + 1)
    x = ids()
    x[:, 3] = ROWS
    for fused in (True, False):
        model.zero_grad()
        model(input_ids=x, labels=x, skip_logits=fused).loss.backward()
        assert model.model.embed_tokens.weight.grad[ROWS].any()
        assert model.lm_head.weight.grad[ROWS].any()


@TIED
def test_it_is_saved_and_read_again(tied: bool, tmp_path: Path) -> None:
    model = load_model(base(tmp_path / "b", tied))
    grow_vocabulary(model, ROWS + 2)
    x = torch.tensor([[1, ROWS, 5, ROWS + 1]])
    expected = logits(model, x)
    assert model.config.vocab_size == ROWS + 2 == model.config.spec.vocab_size == model.model.spec.vocab_size
    save_model(model, tmp_path / "grown")
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (config["vocab_size"], config["model_type"]) == (ROWS + 2, "llama")
    assert torch.equal(logits(load_model(tmp_path / "grown"), x), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    torch.testing.assert_close(logits(theirs, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [ROWS, ROWS - 5, 1])
def test_enough_rows_are_left_alone(rows: int, tmp_path: Path) -> None:
    model = load_model(base(tmp_path / "b"))
    before = dict(model.named_parameters())
    grow_vocabulary(model, rows)
    assert all(weight is before[name] for name, weight in model.named_parameters())
    assert model.config.vocab_size == ROWS


def test_a_model_without_an_output_head(tmp_path: Path) -> None:
    """A reward model has a score head, which has nothing to do with the vocabulary."""
    scorer = from_language_model(load_model(base(tmp_path / "b")), seed=0)
    scorer.config.pad_token_id = 0
    before = logits(scorer)
    grow_vocabulary(scorer, ROWS + 2)
    assert torch.equal(logits(scorer), before)
    assert scorer.model.embed_tokens.weight.shape[0] == ROWS + 2 and scorer.score.weight.shape == (1, 16)


def test_tables_apart_and_together() -> None:
    """A head of its own is saved, and both tables are one again afterwards."""
    model = new_model(spec(True), seed=0)
    before = model.state_dict()
    untie(model)
    assert (
        model.lm_head.weight is not model.model.embed_tokens.weight
        and not model.config.spec.tie_word_embeddings
    )
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not model.all_tied_weights_keys and not model.model.spec.tie_word_embeddings
    tie(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.spec.tie_word_embeddings
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("rows", [ROWS - 3, ROWS, ROWS + 3])
def test_resizing(rows: int) -> None:
    model = new_model(spec(False), seed=0)
    tables = [model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()]
    resize_vocabulary(model, rows)
    kept = min(rows, ROWS)
    for table, old in zip((model.model.embed_tokens.weight, model.lm_head.weight), tables, strict=True):
        assert table.shape[0] == rows and torch.equal(table[:kept], old[:kept])
    assert model.config.vocab_size == rows == model.model.spec.vocab_size
