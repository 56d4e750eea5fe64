"""The checkpoint formats we read and write: one row each, config and tensors, both ways.

A row says how another architecture's config reads in our vocabulary. Behaviour never depends on the
row: a model loaded from any of them is the same core with other values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig

from llmctl.errors import UserError, one_of
from llmctl.files import read_json
from llmctl.model.compressed import scheme_in
from llmctl.model.config import MODEL_TYPE, LlmctlConfig
from llmctl.model.families import bert, deepseek, gemma, gpt2, llama, mamba, moe, phi, t5
from llmctl.model.families.row import Family, Inexpressible

# transformers' own fields that travel with a model unchanged
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
START = "decoder_start_token_id"  # of an encoder–decoder
LABELS = ("id2label", "label2id", "problem_type")  # of a model with a score head

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
    raw = {key: _numbers(value) for key, value in raw.items() if key != "quantization_config"}
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
    return written


def _reason(error: Exception) -> str:
    """The line of an error that names the field, as our messages are written."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = "".join(f"{part}." for part in first["loc"])[:-1]
        said = first["msg"].replace("Input should", "should").removeprefix("Value error, ")
        return f"{place}: {said}" if place else said
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
            return name, _written(name, config)
        except Inexpressible as error:
            if spec.family == "auto":
                continue
            raise UserError(
                f"model.family: `{name}` cannot express {error}",
                "set model.family to auto, or change that field",
            ) from None
    return MODEL_TYPE, config.to_diff_dict() | {"model_type": MODEL_TYPE}
