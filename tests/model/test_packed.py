"""Quantized checkpoints: what is written is what transformers reads, and damage is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmctl.errors import UserError
from llmctl.kernels.quantized import Quantized
from llmctl.model.checkpoint import load_model, save_quantized
from llmctl.model.compressed import Scheme
from llmctl.model.leaves import leaves
from llmctl.model.open import open_folded, open_model
from llmctl.model.packed import PackedLinear, paths_of
from llmctl.quantize.absmax import absmax
from llmctl.quantize.scales import codes_of, minmax_scale
from tests.model.cases import ids, theirs

SCHEMES = {
    "int8": Scheme(8, None, True),
    "8 bits by group": Scheme(8, 32, True),
    "4 bits": Scheme(4, 32, True),
    "4 bits by channel": Scheme(4, None, True),
    "4 bits with zeros": Scheme(4, 32, False),
    "3 bits": Scheme(3, 32, True),
}
FAMILIES = ["llama", "llama-tied-mha", "llama-mqa-biases", "mistral-window", "qwen2", "qwen3"]
Tensors = dict[str, torch.Tensor]


def quantized(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    if scheme.symmetric:
        return absmax(weight, scheme.bits, scheme.group)
    grouped = weight.float().unflatten(1, (-1, scheme.group or weight.shape[1]))
    scale, zero = minmax_scale(grouped, scheme.bits)
    codes = codes_of(grouped, scale[..., None], zero[..., None], scheme.bits)
    return Quantized(codes.flatten(1).to(torch.int8), scale, zero.to(torch.int8), scheme.bits)


def written(folder: Path, family: str, scheme: Scheme) -> Path:
    """A model of a family, quantized to nearest; `down_proj` has 112 inputs, so groups of 32 leave it whole."""
    theirs(family, scale=1.5).save_pretrained(folder / "whole")
    model = load_model(folder / "whole")
    chosen = [x for x in leaves(model) if x.kind == "linear" and x.shape[1] % (scheme.group or 1) == 0]
    matrices = {leaf.name: quantized(leaf.module.weight.detach(), scheme) for leaf in chosen}
    (folder / "packed").mkdir()
    save_quantized(model, matrices, scheme, folder / "packed")
    return folder / "packed"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(ids(2, 24)).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_reads_what_our_exact_path_computes(tmp_path: Path, family: str, name: str) -> None:
    scheme = SCHEMES[name]
    folder = written(tmp_path, family, scheme)
    # by default transformers cannot place packed zero points; written out it reads them
    how = {} if scheme.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how))
    torch.testing.assert_close(logits(open_model(folder, exact=True)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_fast_path_is_near_the_exact_one(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path, "llama-mqa-biases", SCHEMES[name])
    exact, fast = logits(open_model(folder, exact=True)), logits(open_model(folder))
    assert float((exact - fast).norm() / exact.norm()) < 0.02
    assert float((exact - logits(load_model(tmp_path / "whole"))).norm()) > float((exact - fast).norm())


def test_what_reads_the_same_input_is_multiplied_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, "qwen2", SCHEMES["int8"])
    packed = [layer for layer in open_model(folder).modules() if isinstance(layer, PackedLinear)]
    assert len(packed) == 3 * 4  # three blocks: qkv, output, gate and up, down
    assert paths_of(open_model(folder)) == "12 products: fbgemm int8, each token as two rows of 8 bits"
    assert paths_of(open_model(folder, exact=True)) == "21 products: weights written out at each product"


def test_a_cast_of_the_model_leaves_packed_weights_alone(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", SCHEMES["4 bits"])
    wide, narrow = open_model(folder), open_model(folder).bfloat16()
    assert float((logits(wide) - logits(narrow)).norm() / logits(wide).norm()) < 0.03


def test_a_quantized_model_is_small_in_memory_and_has_no_whole_copy(tmp_path: Path) -> None:
    model = open_model(written(tmp_path, "llama", SCHEMES["int8"]))
    names = {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters() if "proj" in name}
    assert names == set()


@pytest.mark.parametrize("open_it", [load_model, open_folded])
def test_what_needs_whole_weights_refuses(tmp_path: Path, open_it: Callable[[Path], object]) -> None:
    folder = written(tmp_path, "llama", SCHEMES["4 bits"])
    with pytest.raises(UserError, match="the weights are quantized, and this needs whole ones"):
        open_it(folder)


Q = "model.layers.0.self_attn.q_proj"


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def other(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]).contiguous())


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a scale is missing": (without(f"{Q}.weight_scale"), f"missing tensors: {Q}.weight_scale"),
    "codes are missing": (without(f"{Q}.weight_packed"), f"missing tensors: {Q}.weight"),
    "codes cut short": (
        other(f"{Q}.weight_packed", lambda x: x[:, :-1]),
        f"tensor {Q}.weight_packed is int32 [64, 7], not int32 [64, 8]",
    ),
    "codes of another type": (
        other(f"{Q}.weight_packed", lambda x: x.to(torch.int64)),
        f"tensor {Q}.weight_packed is int64 [64, 8], not int32 [64, 8]",
    ),
    "scales transposed": (
        other(f"{Q}.weight_scale", lambda x: x.t()),
        f"tensor {Q}.weight_scale is float32 [2, 64], not float32 [64, 2]",
    ),
    "scales that are no numbers": (
        other(f"{Q}.weight_scale", lambda x: x > 0),
        f"tensor {Q}.weight_scale is bool [64, 2], not float32 [64, 2]",
    ),
    "a scale of zero": (
        other(f"{Q}.weight_scale", lambda x: x * 0),
        f"tensor {Q}.weight_scale holds numbers that are no scales",
    ),
    "a scale that is not a number": (
        other(f"{Q}.weight_scale", lambda x: x * torch.nan),
        f"tensor {Q}.weight_scale holds numbers that are no scales",
    ),
    "another shape": (
        other(f"{Q}.weight_shape", lambda x: x + 1),
        f"tensor {Q}.weight_shape says [65, 65], but config.json asks for [64, 64]",
    ),
    "a tensor too many": (
        lambda tensors: tensors.__setitem__(f"{Q}.weight_g_idx", torch.arange(64)),
        f"unexpected tensors: {Q}.weight_g_idx",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told(tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    folder = written(tmp_path, "llama", SCHEMES["4 bits"])
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        open_model(folder)
    assert error.value.message == f"{folder}: {message}"
    assert error.value.hint


CONFIGS: dict[str, tuple[Callable[[dict], object], str]] = {
    "another method": (
        lambda c: c.update(quant_method="awq", format="gemm"),
        "quantization_config: the weights are quantized (awq gemm), and of quantized ones only compressed-tensors pack-quantized is read",
    ),
    "another format": (
        lambda c: c.update(format="int-quantized"),
        "quantization_config: the weights are quantized (compressed-tensors int-quantized), "
        "and of quantized ones only compressed-tensors pack-quantized is read",
    ),
    "five bits": (
        lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=5),
        "quantization_config asks for what is not supported: num_bits 5, type int, strategy group, group_size 32",
    ),
    "columns in another order": (
        lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group"),
        "quantization_config asks for what is not supported: "
        "num_bits 4, type int, strategy group, group_size 32, actorder group",
    ),
    "a group that is a list": (
        lambda c: c["config_groups"].update(group_0=[]),
        "quantization_config does not say how weights are stored",
    ),
    "weights that are a list": (
        lambda c: c["config_groups"]["group_0"].update(weights=[8]),
        "quantization_config does not say how weights are stored",
    ),
    "not compressed": (
        lambda c: c.update(quantization_status="frozen"),
        "quantization_config asks for what is not supported: num_bits 4, type int, strategy group, group_size 32",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_followed_is_refused(tmp_path: Path, name: str) -> None:
    change, message = CONFIGS[name]
    folder = written(tmp_path, "llama", SCHEMES["4 bits"])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        open_model(folder)
    assert error.value.message == f"{path}: {message}"
