"""Converting: what is written is the same model, whatever it is written as; pickles are read here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmctl.errors import UserError
from llmctl.model.checkpoint import load_model, save_model
from llmctl.model.classify import from_language_model, open_scorer
from llmctl.recipe.convert import ConvertRecipe
from llmctl.stages import convert
from llmctl.talk import SILENT
from tests.model.cases import ids, theirs


@pytest.fixture
def folder(tmp_path) -> Path:
    theirs("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    return tmp_path / "m"


def converted(folder: Path, **fields) -> Path:
    out = folder.parent / "out"
    result = convert.run(ConvertRecipe(base=str(folder), out=str(out), **fields), SILENT)
    assert result.path == out
    return out


@pytest.mark.parametrize("family", ["phi3", "qwen3", "auto", None])
def test_another_family_says_the_same(folder, family):
    if family == "qwen3":
        with pytest.raises(UserError, match="`qwen3` cannot express qk_norm: False"):
            converted(folder, family=family)
        assert not (folder.parent / "out").exists()
        return
    out = converted(folder, family=family)
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == (family if family == "phi3" else "llama")
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "run.json").read_text())["parents"][0]["path"] == str(folder)
    x = ids(2, 9)
    with torch.no_grad():
        expected = load_model(folder)(x).logits
        for opened in (load_model(out), AutoModelForCausalLM.from_pretrained(out)):
            assert float((opened(x).logits - expected).abs().max()) <= 1e-4


def test_named_chat_templates_come_along(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    out = converted(folder)
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"


def test_another_precision(folder):
    out = converted(folder, dtype="bfloat16")
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_pickle_becomes_safetensors_if_allowed(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        converted(folder)
    assert "--allow-pickle" in caught.value.hint
    found = load_file(converted(folder, allow_pickle=True) / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)


def test_a_reward_model_stays_one(folder):
    scorer = from_language_model(load_model(folder), seed=0)
    save_model(scorer, folder.parent / "r")
    found = open_scorer(converted(folder.parent / "r", family="phi3"))
    assert torch.equal(found.score.weight, scorer.score.weight)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, not a model"):
        converted(folder)
