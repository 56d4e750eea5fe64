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
from tests.model.cases import theirs

SPEC = ModelSection(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(new_model(SPEC, seed=0), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def gpt2(tmp_path) -> Path:
    spec = {
        "norm": "layernorm",
        "position": "learned",
        "ffn": "gelu_tanh",
        "attention_bias": "all",
        "mlp_bias": True,
    }
    save_model(new_model(SPEC.model_copy(update=spec | {"family": "gpt2"}), seed=0), tmp_path / "m")
    return tmp_path / "m"


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Equal to the bit, saved buffers too."""
    ours, others = a.state_dict(), b.state_dict()
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def edit(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def configure(**fields):
    def apply(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | fields))

    return apply


def truncate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def drop_layer(tensors) -> None:
    for name in [n for n in tensors if "layers.1." in n]:
        del tensors[name]


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def other_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.bin")


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
        "pytorch_model.bin is a pickle, which can run code; if you trust it: llmctl convert MODEL --allow-pickle",
    ),
    "other pickles": (
        other_pickles,
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
    "config that our check refuses": (
        configure(num_hidden_layers=10**9),
        "{m}/config.json: num_hidden_layers: should be less than or equal to 10000",
        "copy or download the model again",
    ),
    "config that does not fit together": (
        configure(num_key_value_heads=3),
        "{m}/config.json: num_attention_heads (",
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


# GPT-2's files have other names and shapes than the core: they are what is told
REWRITTEN = {
    "missing": (
        lambda t: t.pop("transformer.h.1.attn.c_attn.bias"),
        "missing tensors: transformer.h.1.attn.c_attn.bias",
    ),
    "unexpected": (
        lambda t: t.update({"transformer.h.2.mlp.c_fc.bias": torch.zeros(64)}),
        "unexpected tensors: transformer.h.2.mlp.c_fc.bias",
    ),
    "shape": (
        lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(48, 16)}),
        "tensor transformer.h.0.attn.c_attn.weight has shape [48, 16], but config.json asks for [16, 48]",
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_damage_is_told_in_the_names_of_the_file(gpt2, name):
    change, message = REWRITTEN[name]
    edit(change)(gpt2)
    with pytest.raises(UserError) as caught:
        load_model(gpt2)
    assert caught.value.message == f"{gpt2}: {message}"


def test_a_file_of_the_backbone_alone_with_old_buffers(gpt2):
    """As GPT-2 itself lies on the hub: no `transformer.` before the names, and masks among the weights."""
    whole = load_model(gpt2)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(gpt2 / WEIGHTS).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, gpt2 / WEIGHTS)
    same(load_model(gpt2), whole)


def test_missing_tensors_list_five_and_the_count(folder):
    edit(drop_layer)(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert caught.value.message.endswith(" and 4 more")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_sharded_weights_load(family, tmp_path):
    """Of a mixture too, whose experts lie in other shards than their router, one tensor each."""
    model = theirs(family)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    whole = load_model(tmp_path / "whole")
    same(load_model(tmp_path / "sharded"), whole)
    whole.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    same(load_model(tmp_path / "ours"), whole)


def test_saved_buffers_keep_their_precision(tmp_path):
    """A router's bias moves in steps that bfloat16 has no room for."""
    model = theirs("deepseek-v3").bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = ours.state_dict()[name]
    assert bias.dtype == torch.float32 and bool(bias.any()) and ours.dtype == torch.bfloat16
    assert load_file(tmp_path / "ours" / WEIGHTS)[name].dtype == torch.float32
    same(load_model(tmp_path / "ours"), ours)
    half = load_model(tmp_path / "ours", torch.bfloat16).state_dict()[name]
    assert torch.equal(half, bias)


def test_tied_weights_are_one_tensor_once_on_disk(gpt2):
    model = load_model(gpt2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name in load_file(gpt2 / WEIGHTS) if "lm_head" in name]


def test_dtype_is_kept_or_chosen(folder):
    load_model(folder).bfloat16().save_pretrained(folder / "half")
    assert load_model(folder / "half").dtype == torch.bfloat16
    assert load_model(folder / "half", torch.float32).dtype == torch.float32


def test_saved_buffers_are_loaded_in_place(tmp_path):
    theirs("deepseek-v3").save_pretrained(tmp_path)
    saved = load_model(tmp_path)
    model = new_model(saved.config.spec, seed=1)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    load_weights(model, tmp_path)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias is bias and bool(bias.any())
    same(model, saved)


def test_weights_are_loaded_in_place(folder):
    model = new_model(SPEC, seed=1)
    before = [weight.data_ptr() for weight in model.parameters()]
    load_weights(model, folder)
    assert [weight.data_ptr() for weight in model.parameters()] == before
    for a, b in zip(model.parameters(), load_model(folder).parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="has another shape than in this run"):
        load_weights(new_model(SPEC.model_copy(update={"intermediate_size": 8}), seed=0), folder)


def pickle_of(folder: Path, **how) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **how)
    return tensors


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("family", ["folder", "gpt2"])
def test_pickles_load_when_allowed(family, zipped, request):
    """In the form torch writes today, which is mapped, and in the one before 1.6, which is read."""
    folder = request.getfixturevalue(family)
    whole = load_model(folder)
    expected = {name: value.clone() for name, value in whole.state_dict().items()}
    pickle_of(folder, _use_new_zipfile_serialization=zipped)
    found = load_model(folder, allow_pickle=True)
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    half = load_model(folder, torch.bfloat16, allow_pickle=True)
    assert torch.equal(half.lm_head.weight, found.lm_head.weight.bfloat16())


def test_sharded_pickles_load_when_allowed(folder):
    expected = load_model(folder).state_dict()
    tensors = pickle_of(folder)
    (folder / "pytorch_model.bin").unlink()
    names = {name: f"pytorch_model-{place % 2}.bin" for place, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    found = load_model(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError, match=r"-1\.bin: missing, though pytorch_model\.bin\.index"):
        load_model(folder, allow_pickle=True)


class Runs:
    """A pickle of this would write a file when it is opened."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


PICKLES = {
    "code": (
        lambda file: torch.save({"a": Runs()}, file),
        "damaged, or holds more than tensors, which could run code",
    ),
    "a trainer's": (
        lambda file: torch.save({"step": 3, "model": {}}, file),
        "holds more than tensors by name",
    ),
    "garbage": (lambda file: file.write_bytes(b"\x80\x02garbage"), "damaged"),
    "empty": (lambda file: file.write_bytes(b""), "damaged"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_hold_more_than_tensors_are_refused(folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write, message = PICKLES[name]
    (folder / WEIGHTS).unlink()
    write(folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_model(folder, allow_pickle=True)
    assert caught.value.message.startswith(f"{folder}/pytorch_model.bin: {message}")
    assert not Path("touched").exists()


def test_safetensors_come_before_pickles(folder):
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    load_model(folder, allow_pickle=True)
