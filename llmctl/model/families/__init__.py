"""The checkpoint formats we read and write: one row each, config and tensors, both ways.

A row says how another architecture's config reads in our vocabulary. Behaviour never depends on the
row: a model loaded from any of them is the same core with other values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig

from llmctl.errors import UserError, one_of
from llmctl.files import read_json
from llmctl.model.compressed import scheme_in
from llmctl.model.config import MODEL_TYPE, LlmctlConfig
from llmctl.model.families import bert, deepseek, gemma, gpt2, llama, mamba, moe, phi, t5
from llmctl.model.families.row import Family, Inexpressible
from llmctl.model.notes import culprit, say_once

# transformers' own fields that travel with a model unchanged
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
START = "decoder_start_token_id"  # of an encoder–decoder
LABELS = ("id2label", "label2id", "problem_type")  # of a model with a score head
# of a file, not of a model: what it says of weights is looked up where they are opened, and code is not run
OF_FILE = ("quantization_config", "dtype", "torch_dtype", "auto_map", "transformers_version")
KEPT = "fields_kept"  # our config's attribute for what `_kept` finds: (family, fields)

# in the order in which `auto` asks who can express a model
FAMILIES: dict[str, Family] = {
    **llama.ROWS, **phi.ROWS, **gemma.ROWS, **gpt2.ROWS, **moe.ROWS, **deepseek.ROWS, **mamba.ROWS,
    **bert.ROWS, **t5.ROWS,
}  # fmt: skip


def config_in(folder: Path) -> LlmctlConfig:
    """The config of a model folder. Raises UserError as `read_json` and `read_config` do."""
    path = folder / "config.json"
    return read_config(read_json(path), str(path))


def read_config(raw: dict[str, Any], where: str) -> LlmctlConfig:
    """Our config from the contents of a `config.json`.

    Raises:
        UserError: weights quantized in a way that is not read, an architecture we have no row for (lists those we have), one whose
            config uses something the row cannot express, or a value that makes no sense.
    """
    scheme_in(raw, where)  # weights in a format we cannot read are told first
    dtype = dtype_named(raw, where)
    if raw.get("auto_map"):
        say_once(f"{where}: auto_map names code of the model's own, which is not run")
    raw = {key: _numbers(value) for key, value in raw.items() if key not in OF_FILE}
    if dtype is not None:
        raw["dtype"] = str(dtype).removeprefix("torch.")  # the only form that transformers' config can read
    name = raw.get("model_type")
    if not isinstance(name, str) or (name != MODEL_TYPE and name not in FAMILIES):
        shown = "no model_type" if name is None else f"unsupported architecture `{name}`"
        raise UserError(f"{where}: {shown}", f"supported: {one_of([*FAMILIES, MODEL_TYPE])}")
    _refuse_garbage(name, raw, where)
    try:
        return _without_stray_padding(_config(name, raw), where)
    except Inexpressible as error:
        raise UserError(f"{where}: {name} config is not supported: {error}", "see docs/model.md") from None
    except FAULTS as error:
        reason, field = _reason(error), culprit(raw, partial(_config, name), (*FAULTS, Inexpressible))
        if field is not None and field not in reason:  # as in "invalid literal for int()"
            reason = f"{field}: {reason}"
        raise UserError(f"{where}: {reason}", "copy or download the model again") from error


# what transformers and pydantic raise for values of the wrong type or size
FAULTS = (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError)


def _config(name: str, raw: Mapping[str, Any]) -> LlmctlConfig:
    if name == MODEL_TYPE:
        return LlmctlConfig(**{key: value for key, value in raw.items() if key != "model_type"})
    theirs = AutoConfig.for_model(
        **copy.deepcopy({**raw, "model_type": name})
    )  # it writes into what it is given
    config = _translated(name, theirs)
    setattr(config, KEPT, (name, _kept(name, raw)))
    return config


def _refuse_garbage(name: str, raw: Mapping[str, Any], where: str) -> None:
    """Raise UserError for sizes that transformers would divide by or build lists of, and `architectures` without names."""
    sizes = FAMILIES[name].sizes if name in FAMILIES else {ours: ours for ours in SIZES}
    bounds = {theirs: SIZES[ours] for ours, theirs in sizes.items() if ours in SIZES}
    bounds["num_labels"] = MOST_LABELS
    for field, most in bounds.items():
        size = raw.get(field)
        least = 0 if field == "num_labels" else 1
        if type(size) is int and not least <= size <= most:
            how = f"less than or equal to {most}" if size > most else "greater than 0"
            raise UserError(f"{where}: {field}: should be {how}", "copy or download the model again")
    listed = raw.get("architectures") or []
    if not isinstance(listed, str | list) or not all(isinstance(one, str) for one in listed):
        raise UserError(
            f"{where}: architectures: {listed!r} is not a list of names", "copy or download the model again"
        )


LARGEST, MOST_LABELS = 2**31 - 1, 10**6
# our sizes -> the most that a config can mean
SIZES = {
    "vocab_size": LARGEST, "hidden_size": LARGEST, "intermediate_size": LARGEST, "head_dim": LARGEST,
    "num_hidden_layers": 10_000, "num_attention_heads": LARGEST, "num_key_value_heads": LARGEST,
}  # fmt: skip


def _kept(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that no architecture of transformers knows, or that say how a model is used; they are saved as they were."""
    known = AutoConfig.for_model(name)
    return {
        key: value
        for key, value in raw.items()
        if key in USE
        or not (key in SPOKEN or key.startswith("_") or key in vars(known) or key in known.attribute_map)
    }


USE = ("use_cache",)  # says how a model is used, and nothing of what it is
# fields of config.json that are read here, though transformers' classes have no such attribute; rope has older words
SPOKEN = frozenset({
    "model_type", "architectures", "rope_theta", "rope_scaling", "partial_rotary_factor", "max_position_embeddings",
    "router_aux_loss_coef", "output_router_logits", *moe.TRAINING,
})  # fmt: skip


def _without_stray_padding(config: LlmctlConfig, where: str) -> LlmctlConfig:
    """The config, without a padding token that the model has no row for: transformers would not open it."""
    pad = getattr(config, "pad_token_id", None)  # our own kind has it only where it was given
    if pad is not None and pad >= config.vocab_size:
        say_once(f"{where}: pad_token_id {pad} is beyond the vocabulary of {config.vocab_size:,}: left out")
        config.pad_token_id = None
    return config


def dtype_named(raw: Mapping[str, Any], where: str) -> torch.dtype | None:
    """The precision that the contents of a `config.json` name; None if that is as the weights are stored.

    Raises UserError if it is no precision of weights.
    """
    field = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    named = raw.get(field)
    if named is None or named == "auto":
        return None
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(
            f"{where}: {field}: `{named}` is not a precision of weights",
            "write float32, bfloat16, float16 or auto",
        )
    return found


def _numbers(value: Any) -> Any:
    """A value of `config.json`, where transformers writes what JSON has no number for as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _numbers(inner) for key, inner in value.items()}
    return [_numbers(inner) for inner in value] if isinstance(value, list) else value


def _translated(name: str, theirs: PreTrainedConfig) -> LlmctlConfig:
    fields = FAMILIES[name].to_ours(theirs) | {"family": name}
    return LlmctlConfig(**fields, **carried(theirs, *LABELS, "architectures"))


def carried(config: PreTrainedConfig, *more: str) -> dict[str, Any]:
    """The ids of special tokens, and the fields named besides, None where there are none."""
    start = (START,) if config.is_encoder_decoder else ()
    return {key: getattr(config, key, None) for key in (*CARRIED, *start, *more)}


def _written(name: str, config: LlmctlConfig) -> dict[str, Any]:
    """The `config.json` contents of one family. Raises Inexpressible."""
    fields = FAMILIES[name].to_theirs(config.spec)
    written = AutoConfig.for_model(name, **fields, **carried(config, *LABELS)).to_diff_dict()
    FAMILIES[name].finish(config.spec, written)
    family, kept = getattr(config, KEPT, (None, {}))
    return written if family != name else kept | written | {key: kept[key] for key in USE if key in kept}


def _reason(error: Exception) -> str:
    """The line of an error that names the field, as our messages are written."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = "".join(f"{part}." for part in first["loc"])[:-1]
        said = first["msg"].replace("Input should", "should").removeprefix("Value error, ")
        return f"{place}: {said}" if place else said
    said = str(error.args[0] if error.args else error).strip().splitlines()[-1].strip()
    said = said.removeprefix("TypeError: ").removeprefix("ValueError: ")
    said = said.partition(". Errors: ")[0].rstrip(".")  # one for each type that would have done
    return said[:1].lower() + said[1:]


def write_config(config: LlmctlConfig) -> tuple[str, dict[str, Any]]:
    """The family a model is saved as, and its `config.json` contents.

    The model's own `family` if it names one, else the first row that expresses it, else `llmctl`.

    Raises UserError if the named family cannot express the model.
    """
    spec = config.spec
    names = list(FAMILIES) if spec.family == "auto" else [spec.family]
    for name in names:
        if name == MODEL_TYPE:
            break
        try:
            return name, _written(name, config)
        except Inexpressible as error:
            if spec.family == "auto":
                continue
            raise UserError(
                f"model.family: `{name}` cannot express {error}",
                "set model.family to auto, or change that field",
            ) from None
    fields = {key: value for key, value in config.to_diff_dict().items() if key != KEPT}
    return MODEL_TYPE, fields | {"model_type": MODEL_TYPE}
