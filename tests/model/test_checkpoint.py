"""Loading: what is wrong with a folder is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.errors import UserError
from llmctl.model.checkpoint import load_model, load_weights, new_model, save_model
from llmctl.recipe.model import ModelSection

SPEC = ModelSection(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(new_model(SPEC, seed=0), tmp_path / "m")
    return tmp_path / "m"


def edit(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def truncate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def drop_layer(tensors) -> None:
    for name in [n for n in tensors if "layers.1." in n]:
        del tensors[name]


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_config.json").write_text("{}")


def unfinished(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)


def lost_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


DAMAGE = {
    "truncated": (truncate, "{m}/model.safetensors: damaged or cut short", "copy or download it again"),
    "garbage": (
        lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 64),
        "{m}/model.safetensors: damaged or cut short",
        "copy or download it again",
    ),
    "no weights": (
        lambda m: (m / WEIGHTS).unlink(),
        "{m}: no model.safetensors",
        "copy or download the model again",
    ),
    "pickle": (
        pickled,
        "{m}: no model.safetensors",
        "only safetensors are read; pickled .bin files can run code",
    ),
    "adapter": (adapter, "{m}: no model.safetensors", "this folder holds an adapter, not a model"),
    "unfinished": (unfinished, "{m}: no model.safetensors", "the run was not finished; go on with --resume"),
    "lost shard": (lost_shard, "{m}/model-1.safetensors: missing, though", "copy or download it again"),
    "missing": (
        edit(drop_layer),
        "{m}: missing tensors: model.layers.1.input_layernorm.weight, ",
        "the weights do not belong to this config.json",
    ),
    "unexpected": (
        edit(lambda t: t.update({"extra.weight": torch.zeros(1)})),
        "{m}: unexpected tensors: extra.weight",
        "the weights do not belong to this config.json",
    ),
    "shape": (
        edit(lambda t: t.update({"model.norm.weight": torch.zeros(8)})),
        "{m}: tensor model.norm.weight has shape [8], but config.json asks for [16]",
        "the weights belong to another config",
    ),
    "quantized": (
        edit(lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int8)})),
        "{m}: tensor model.norm.weight holds torch.int8, not weights",
        "is it quantized?",
    ),
    "no config": (
        lambda m: (m / "config.json").unlink(),
        "{m}: not a model folder (no config.json)",
        "see `llmctl",
    ),
    "bad config": (
        lambda m: (m / "config.json").write_text('{"model_type": '),
        "{m}/config.json: not valid JSON",
        "copy or download the model again",
    ),
    "config is a list": (
        lambda m: (m / "config.json").write_text("[]"),
        "{m}/config.json: not a JSON object",
        "copy or download the model again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(folder, name):
    damage, message, hint = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert caught.value.message.startswith(message.format(m=folder)), caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_missing_tensors_list_five_and_the_count(folder):
    edit(drop_layer)(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert caught.value.message.endswith(" and 4 more")


def test_sharded_weights_load(folder):
    whole = load_model(folder)
    whole.save_pretrained(folder / "sharded", max_shard_size="10KB")
    assert len(list((folder / "sharded").glob("model-*.safetensors"))) > 1
    again = load_model(folder / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_dtype_is_kept_or_chosen(folder):
    load_model(folder).bfloat16().save_pretrained(folder / "half")
    assert load_model(folder / "half").dtype == torch.bfloat16
    assert load_model(folder / "half", torch.float32).dtype == torch.float32


def test_weights_are_loaded_in_place(folder):
    model = new_model(SPEC, seed=1)
    before = [weight.data_ptr() for weight in model.parameters()]
    load_weights(model, folder)
    assert [weight.data_ptr() for weight in model.parameters()] == before
    for a, b in zip(model.parameters(), load_model(folder).parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="has another shape than in this run"):
        load_weights(new_model(SPEC.model_copy(update={"intermediate_size": 8}), seed=0), folder)
