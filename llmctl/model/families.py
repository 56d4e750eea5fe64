"""The checkpoint formats we read and write: one row each, config and tensors, both ways.

A row says how another architecture's config reads in our vocabulary. Behaviour never depends on the
row: a model loaded from any of them is the same core with other values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig

from llmctl.errors import UserError, one_of
from llmctl.files import read_json
from llmctl.model.compressed import scheme_in
from llmctl.model.config import MODEL_TYPE, LlmctlConfig
from llmctl.model.keymap import Rule
from llmctl.model.positions import ROPE_TYPES
from llmctl.recipe.model import ModelSection

# transformers' own fields that travel with a model unchanged
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
LABELS = ("id2label", "label2id", "problem_type")  # of a model with a score head
SLIDING = "sliding_attention"


class Inexpressible(Exception):
    """A config says something that the other side has no word for; the message names the field."""


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        prefix: how the family's transformers classes begin, as in `LlamaForCausalLM`.
        read: their config -> our fields (beyond those all rows share).
        write: our spec -> their fields; raises Inexpressible.
        rules: how tensors are renamed and reshaped; none for models that already use Llama's names.
    """

    prefix: str
    read: Callable[[PreTrainedConfig], dict[str, Any]]
    write: Callable[[ModelSection], dict[str, Any]]
    rules: tuple[Rule, ...] = ()


SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


def _require(spec: ModelSection, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(spec, name) != value:
            raise Inexpressible(f"{name}: {getattr(spec, name)}")


def _read_llama(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": "all" if config.attention_bias else "none", "mlp_bias": config.mlp_bias}


def _write_llama(spec: ModelSection) -> dict[str, Any]:
    _require(spec, qk_norm=False, sliding_window=None)
    if spec.attention_bias == "qkv":
        raise Inexpressible("attention_bias: qkv")
    if spec.hidden_size % spec.num_attention_heads:
        raise Inexpressible(f"hidden_size {spec.hidden_size} with {spec.num_attention_heads} heads")
    return {"attention_bias": spec.attention_bias == "all", "mlp_bias": spec.mlp_bias}


def _read_mistral(config: PreTrainedConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    return {"sliding_window": config.sliding_window, "pattern": ["sliding"]}


def _write_mistral(spec: ModelSection) -> dict[str, Any]:
    _require(spec, qk_norm=False, attention_bias="none", mlp_bias=False)
    if set(_layers(spec)) == {"full", "sliding"}:
        raise Inexpressible(f"pattern: {spec.pattern}")
    return {"sliding_window": spec.sliding_window if "sliding" in _layers(spec) else None}


def _read_qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": "qkv", **_read_layer_types(config)}


def _write_qwen2(spec: ModelSection) -> dict[str, Any]:
    _require(spec, qk_norm=False, attention_bias="qkv", mlp_bias=False)
    if spec.head_dim != spec.hidden_size // spec.num_attention_heads:
        raise Inexpressible(f"head_dim: {spec.head_dim}")
    return _write_layer_types(spec)


def _read_qwen3(config: PreTrainedConfig) -> dict[str, Any]:
    bias = "all" if config.attention_bias else "none"
    return {"attention_bias": bias, "qk_norm": True, **_read_layer_types(config)}


def _write_qwen3(spec: ModelSection) -> dict[str, Any]:
    _require(spec, qk_norm=True, mlp_bias=False)
    if spec.attention_bias == "qkv":
        raise Inexpressible("attention_bias: qkv")
    return {"attention_bias": spec.attention_bias == "all", **_write_layer_types(spec)}


def _read_layer_types(config: PreTrainedConfig) -> dict[str, Any]:
    pattern = ["sliding" if kind == SLIDING else "full" for kind in config.layer_types]
    if "sliding" not in pattern:
        return {}
    return {"sliding_window": config.sliding_window, "pattern": pattern}


def _write_layer_types(spec: ModelSection) -> dict[str, Any]:
    sliding = spec.sliding_window is not None
    types = [SLIDING if kind == "sliding" else "full_attention" for kind in _layers(spec)]
    return {"use_sliding_window": sliding, "sliding_window": spec.sliding_window, "layer_types": types}


def _layers(spec: ModelSection) -> list[str]:
    return [spec.layer_pattern(layer) for layer in range(spec.num_hidden_layers)]


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", _read_llama, _write_llama),
    "mistral": Family("Mistral", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2", _read_qwen2, _write_qwen2),
    "qwen3": Family("Qwen3", _read_qwen3, _write_qwen3),
}


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
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    name = raw.get("model_type")
    if name != MODEL_TYPE and name not in FAMILIES:
        shown = "no model_type" if name is None else f"unsupported architecture `{name}`"
        raise UserError(f"{where}: {shown}", f"supported: {one_of([*FAMILIES, MODEL_TYPE])}")
    try:
        if name == MODEL_TYPE:
            return LlmctlConfig(**{key: value for key, value in raw.items() if key != "model_type"})
        return _translated(name, AutoConfig.for_model(**raw))
    except Inexpressible as error:
        raise UserError(f"{where}: {name} config is not supported: {error}", "see docs/model.md") from None
    # what transformers and pydantic raise for values of the wrong type or size
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise UserError(f"{where}: {_reason(error)}", "copy or download the model again") from error


def _translated(name: str, theirs: PreTrainedConfig) -> LlmctlConfig:
    fields = {key: getattr(theirs, key) for key in SHARED if getattr(theirs, key, None) is not None}
    fields |= {"rope_parameters": _read_rope(theirs), "family": name, **FAMILIES[name].read(theirs)}
    _refuse_extras(theirs)
    carried = {key: getattr(theirs, key, None) for key in (*CARRIED, *LABELS, "architectures")}
    return LlmctlConfig(**fields, **carried)


def _reason(error: Exception) -> str:
    """The line of an error that names the field, as our messages are written."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].replace('Input should', 'should')}"
    said = str(error.args[0] if error.args else error).strip().splitlines()[-1].strip()
    said = said.removeprefix("TypeError: ").removeprefix("ValueError: ").rstrip(".")
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
            fields = FAMILIES[name].write(spec)
        except Inexpressible as error:
            if spec.family == "auto":
                continue
            raise UserError(
                f"model.family: `{name}` cannot express {error}",
                "set model.family to auto, or change that field",
            ) from None
        shared = {key: getattr(spec, key) for key in SHARED}
        theirs = AutoConfig.for_model(
            name,
            **shared,
            **fields,
            hidden_act="silu",
            rope_parameters=spec.rope_parameters.model_dump(),
            **{key: getattr(config, key, None) for key in (*CARRIED, *LABELS)},
        )
        return name, theirs.to_diff_dict()
    return MODEL_TYPE, config.to_diff_dict() | {"model_type": MODEL_TYPE}


def _read_rope(theirs: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(theirs.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise Inexpressible(f"rope_type: {kind} (supported: {', '.join(ROPE_TYPES)})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Inexpressible(f"partial_rotary_factor: {rope['partial_rotary_factor']}")
    known = {
        "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    }  # fmt: skip
    numbers = {key: value for key, value in rope.items() if key in known and value is not None}
    if kind != "llama3":
        numbers.pop("original_max_position_embeddings", None)
    return {
        key: float(value) if key.endswith(("theta", "factor")) else value for key, value in numbers.items()
    }


def _refuse_extras(theirs: PreTrainedConfig) -> None:
    if theirs.hidden_act != "silu":
        raise Inexpressible(f"hidden_act: {theirs.hidden_act}")
    if getattr(theirs, "attention_dropout", 0.0):
        raise Inexpressible(f"attention_dropout: {theirs.attention_dropout}")
