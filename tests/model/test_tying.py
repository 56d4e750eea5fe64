"""Heads that the config calls tied and the files do not, and the other way round, against transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from llmctl.errors import UserError
from llmctl.model.checkpoint import load_config, load_model, save_model
from llmctl.model.hf import LlmctlForCausalLM, LlmctlPreTrainedModel
from llmctl.model.masked import LlmctlForMaskedLM
from llmctl.model.notes import say_once
from llmctl.model.open import open_folded
from llmctl.model.seq2seq import LlmctlForConditionalGeneration
from tests.model.cases import CASES, SMALL

WEIGHTS = "model.safetensors"
# model type -> its settings, names of head and table in its files
TIED: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({}, "lm_head.weight", "model.embed_tokens.weight"),
    "qwen2": ({}, "lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ({}, "lm_head.weight", "transformer.wte.weight"),
    "gemma2": (CASES["gemma2"][1], "lm_head.weight", "model.embed_tokens.weight"),
    "phi3": ({}, "lm_head.weight", "model.embed_tokens.weight"),
    "mixtral": (CASES["mixtral"][1], "lm_head.weight", "model.embed_tokens.weight"),
    "mamba2": (CASES["mamba2-groups-tied"][1], "lm_head.weight", "backbone.embeddings.weight"),
    "bert": ({}, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "t5": ({"d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4}, "lm_head.weight", "shared.weight"),
}  # fmt: skip
KINDS: dict[str, tuple[Any, type[LlmctlPreTrainedModel]]] = {
    "bert": (AutoModelForMaskedLM, LlmctlForMaskedLM),
    "t5": (AutoModelForSeq2SeqLM, LlmctlForConditionalGeneration),
}
LANGUAGE = (AutoModelForCausalLM, LlmctlForCausalLM)
IDS = torch.tensor([[5, 9, 30, 11, 7]])


@pytest.fixture(autouse=True)
def _said_again() -> None:
    say_once.cache_clear()


def folder(name: str, where: Path) -> Path:
    """A tied model as transformers saves it: without a head."""
    config = AutoConfig.for_model(name, **{**SMALL, **TIED[name][0], "tie_word_embeddings": True})
    torch.manual_seed(0)
    model = KINDS.get(name, LANGUAGE)[0].from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(3)
    model.save_pretrained(where)
    return where


def edited(where: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into the file, or take them out."""
    tensors = load_file(where / WEIGHTS) | change
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        where / WEIGHTS,
        {"format": "pt"},
    )


@torch.no_grad()
def logits(model: torch.nn.Module, name: str) -> torch.Tensor:
    return model.eval()(**({"decoder_input_ids": IDS} if name == "t5" else {}), input_ids=IDS).logits


def both(where: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Their logits and ours."""
    auto, kind = KINDS.get(name, LANGUAGE)
    return logits(auto.from_pretrained(where), name), logits(load_model(where, kind=kind), name)


@pytest.mark.parametrize("name", TIED)
def test_a_head_of_its_own_is_kept_whatever_the_config_says(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = folder(name, tmp_path / "m")
    _, head, table = TIED[name]
    tied, _ = both(where, name)
    own = load_file(where / WEIGHTS)[table].flip(0).contiguous()
    edited(where, {head: own})
    with caplog.at_level(logging.WARNING, "llmctl"):
        wanted, found = both(where, name)
        config = load_config(where)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - tied).abs().max() > 0.1
    assert config.tie_word_embeddings is False
    said = (
        f"{where}/config.json: tie_word_embeddings is true, but the weights hold a head of their own "
        f"({head}), which is kept"
    )
    assert [record.getMessage() for record in caplog.records if record.name == "llmctl"] == [said]
    if name == "t5":  # scaled as a tied one, which no config of T5's can say of another
        return
    save_model(load_model(where, kind=KINDS.get(name, LANGUAGE)[1]), tmp_path / "saved")
    for again in both(tmp_path / "saved", name):
        torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("tie_word_embeddings") is not True


@pytest.mark.parametrize("name", TIED)
def test_an_equal_head_stays_tied(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = folder(name, tmp_path / "m")
    _, head, table = TIED[name]
    edited(where, {head: load_file(where / WEIGHTS)[table].clone()})
    with caplog.at_level(logging.WARNING, "llmctl"):
        wanted, found = both(where, name)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    model = load_model(where, kind=KINDS.get(name, LANGUAGE)[1])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert load_config(where).tie_word_embeddings is True
    assert not [record for record in caplog.records if record.name == "llmctl"]


def test_a_table_that_is_stored_as_the_head_alone(tmp_path: Path) -> None:
    """As `safetensors.torch.save_model` leaves it."""
    where = folder("llama", tmp_path / "m")
    _, head, table = TIED["llama"]
    edited(where, {head: load_file(where / WEIGHTS)[table], table: None})
    wanted, found = both(where, "llama")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_untied_head_that_is_missing_is_refused(name: str, tmp_path: Path) -> None:
    where = folder(name, tmp_path / "m")
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError) as caught:
        load_model(where)
    said = f"{where}/config.json: tie_word_embeddings is false, but the weights hold no head (lm_head.weight)"
    assert caught.value.message == said
    assert caught.value.hint == "set it to true if the head is the embedding table"


def test_a_pickle_with_a_head_of_its_own(tmp_path: Path) -> None:
    where = folder("llama", tmp_path / "m")
    own = torch.randn(SMALL["vocab_size"], SMALL["hidden_size"])
    edited(where, {"lm_head.weight": own})
    torch.save(load_file(where / WEIGHTS), where / "pytorch_model.bin")
    (where / WEIGHTS).unlink()
    assert torch.equal(load_model(where, allow_pickle=True).lm_head.weight, own)
    assert load_config(where).tie_word_embeddings is True  # pickles are opened only where they are allowed


def test_a_folder_opened_twice_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = folder("llama", tmp_path / "m")
    edited(where, {"lm_head.weight": torch.randn(SMALL["vocab_size"], SMALL["hidden_size"])})
    with caplog.at_level(logging.WARNING, "llmctl"):
        open_folded(where)
        open_folded(where)
    assert len([record for record in caplog.records if record.name == "llmctl"]) == 1
