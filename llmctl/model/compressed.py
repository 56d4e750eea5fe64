"""Quantized checkpoints in the compressed-tensors format, `pack-quantized`: what transformers and vLLM open.

A quantized layer `X` is stored as

    X.weight_packed      int32 [O, words]     codes, `kernels/packing.py`
    X.weight_scale       float32 [O, G]
    X.weight_zero_point  int32 [words, G]     codes packed along O; asymmetric only
    X.weight_shape       int64 [2]            O, I

and `config.json` says in `quantization_config` how to read it, and which layers are stored in full.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import UserError
from llmctl.kernels.packing import pack_words, unpack_words, words_for
from llmctl.kernels.quantized import Quantized

BITSANDBYTES = ("load_in_4bit", "load_in_8bit")  # its fields, without `quant_method` in older files
METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = (8, 4, 3)
PACKED, SCALE, ZERO, SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"
DAMAGED = "copy or download it again, or quantize the original model again"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Scheme:
    """How the quantized layers of a checkpoint are stored.

    Attributes:
        group: inputs that share a scale; None: a scale for each output (strategy `channel`).
    """

    bits: int
    group: int | None
    symmetric: bool

    def to_config(self, ignore: Collection[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; `ignore` names the layers that are stored in full."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "dynamic": False,
        }
        if self.group is not None:
            weights["group_size"] = self.group
        layers = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            # with any other word transformers reads the packed weights as if they were whole
            "quantization_status": "compressed",
            "config_groups": {"group_0": layers | {"output_activations": None}},
            "ignore": sorted(ignore),
        }


def scheme_in(raw: Mapping[str, Any], where: str) -> Scheme | None:
    """How a checkpoint is quantized, from the contents of its config.json; None if it is not.

    Raises UserError for another format, and for schemes that this format has and we do not.
    """
    config = raw.get("quantization_config")
    if not config:
        return None
    told = config if isinstance(config, dict) else {}
    loads = [told[name] for name in BITSANDBYTES if name in told]
    if loads and not any(loads):
        return None
    unnamed = "bitsandbytes" if loads else config if isinstance(config, str) else "unknown"
    method = told.get("quant_method") or unnamed
    found = f"{method} {told['format']}" if "format" in told else str(method)
    groups = told.get("config_groups")
    if method != METHOD or told.get("format") != FORMAT or not isinstance(groups, dict) or len(groups) != 1:
        raise UserError(
            f"{where}: quantization_config: the weights are quantized ({found}), and of quantized ones only {METHOD} {FORMAT} is read",
            "use the model they were made from, and `llmctl quantize` it",
        )
    (layers,) = groups.values()
    weights = layers.get("weights") if isinstance(layers, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{where}: quantization_config does not say how weights are stored", DAMAGED)
    group = weights.get("group_size") if weights.get("strategy") == "group" else None
    plain = (
        weights.get("num_bits") in BITS
        and weights.get("type", "int") == "int"
        and weights.get("strategy") in ("group", "channel")
        and not weights.get("dynamic")
        and weights.get("actorder") != "group"
        and not layers.get("input_activations")
        and told.get("quantization_status") == "compressed"
        and (weights.get("strategy") == "channel" or (isinstance(group, int) and group > 0))
    )
    if not plain:
        raise UserError(
            f"{where}: quantization_config asks for what is not supported: {_shown(weights)}",
            "supported: compressed integer weights of 8, 4 or 3 bits, by channel or by group",
        )
    return Scheme(weights["num_bits"], group, bool(weights.get("symmetric", True)))


def _shown(weights: Mapping[str, Any]) -> str:
    told = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "group_size", "actorder")}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)


def stored(name: str, matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one layer."""
    tensors = {
        name + PACKED: pack_words(matrix.codes, matrix.bits),
        name + SCALE: matrix.scale.cpu().contiguous(),
        name + SHAPE: torch.tensor(matrix.codes.shape),
    }
    if matrix.zero is not None:
        tensors[name + ZERO] = pack_words(matrix.zero.t().contiguous(), matrix.bits).t().contiguous()
    return tensors


def stored_bytes(matrix: Quantized) -> int:
    """Bytes of a layer's codes, scales and zero points on disk."""
    (outputs, inputs), groups = matrix.codes.shape, matrix.scale.shape[1]
    words = outputs * words_for(inputs, matrix.bits)
    if matrix.zero is not None:
        words += words_for(outputs, matrix.bits) * groups
    return 4 * (words + outputs * groups)


def layers_in(names: Collection[str]) -> list[str]:
    """The quantized layers among the tensors of a checkpoint."""
    return [name.removesuffix(PACKED) for name in names if name.endswith(PACKED)]


def read_layer(name: str, shape: tuple[int, int], scheme: Scheme, read: Read, folder: Path) -> Quantized:
    """One layer [O, I] of a checkpoint.

    Raises UserError if a tensor is missing, has another shape than config.json asks for, or holds scales
    that are none.
    """
    outputs, inputs = shape
    group = scheme.group or inputs
    if inputs % group:
        raise UserError(
            f"{folder}: {name} has {inputs} inputs, which groups of {group} do not divide", DAMAGED
        )
    groups = inputs // group
    words = _read(name + PACKED, (outputs, words_for(inputs, scheme.bits)), (torch.int32,), read, folder)
    scale = _read(name + SCALE, (outputs, groups), FLOATS, read, folder).float()
    said = _read(name + SHAPE, (2,), (torch.int64, torch.int32), read, folder)
    if said.tolist() != [outputs, inputs]:
        raise UserError(
            f"{folder}: tensor {name}{SHAPE} says {said.tolist()}, but config.json asks for {list(shape)}",
            DAMAGED,
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError(f"{folder}: tensor {name}{SCALE} holds numbers that are no scales", DAMAGED)
    zero = None
    if not scheme.symmetric:
        packed = _read(name + ZERO, (words_for(outputs, scheme.bits), groups), (torch.int32,), read, folder)
        zero = unpack_words(packed.t().contiguous(), scheme.bits, outputs).t().contiguous()
    return Quantized(unpack_words(words, scheme.bits, inputs), scale, zero, scheme.bits)


def _read(
    name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], read: Read, folder: Path
) -> Tensor:
    try:
        tensor = read(name)
    except KeyError:
        raise UserError(f"{folder}: missing tensors: {name}", DAMAGED) from None
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        found, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, dtypes[0]))
        raise UserError(
            f"{folder}: tensor {name} is {found} {list(tensor.shape)}, not {wanted} {list(shape)}", DAMAGED
        )
    return tensor
