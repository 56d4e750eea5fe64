"""What an adapter folder holds: PEFT's `adapter_config.json` and `adapter_model.safetensors`, read part by part.

Names are those of the modules the adapter was trained on, until `adapter_names` translates them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llmctl.errors import CheckFailed, UserError
from llmctl.files import read_json
from llmctl.runs import run_of

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in the file
EMBEDDINGS = ("embed_tokens", "wte", "embeddings")  # last words of the embedding table's name in our families
HEAD = "lm_head"

# Fields of a LoRA config that change what the model computes in a way that is not implemented here.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora",
)  # fmt: skip
# Initializations that put something else in the place of the base's weights, which the adapter is then added to.
# The first two follow from the base alone, so PEFT does it again when it opens the adapter.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# name after the module -> field of `Factors`
_FACTORS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "bias",
    "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_ENDS = re.compile(
    r"(?P<module>.+?)\.(?:(?P<factor>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta)"
    r"|modules_to_save\.(?P<own>.+)|(?:token_adapter\.)?(?:base_layer|original_module)\.(?P<base>weight|bias))"
)


@dataclass
class Factors:
    """A low-rank update of one matrix: alpha / r · b a, with a [r, in] and b [out, r]; of a table a is [r, rows].

    Attributes:
        magnitude: DoRA's norms, one an output.
        bias: what is added to the outputs, one an output.
    """

    a: Tensor
    b: Tensor
    alpha: float = 0.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def r(self) -> int:
        return self.a.shape[0]


@dataclass
class Adapter:
    """The parts of an adapter.

    Attributes:
        matrices: module -> its update; of an adapted parameter of another kind, its whole name.
        tables: embedding module -> its update.
        rows: module -> trained tokens and their rows.
        own: tensor name -> what stands in the base's place, in this module alone (`modules_to_save`).
        base: tensor name -> what the base holds there, wherever it is used: biases, and tables that have grown.
    """

    matrices: dict[str, Factors] = field(default_factory=dict)
    tables: dict[str, Factors] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_settings(folder: Path) -> LoraConfig:
    """`adapter_config.json` as PEFT understands it.

    Raises UserError: not LoRA, a field that is not implemented or unknown, or values PEFT refuses.
    """
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(
            f"{folder}: adapter of kind {raw.get('peft_type')} is not supported", "LoRA adapters are"
        )
    fields = {name: value for name, value in raw.items() if name in LoraConfig.__dataclass_fields__}
    unknown = (
        name for name, value in raw.items() if name not in fields and value not in (None, False, {}, [])
    )
    if name := next((name for name in (*_UNSUPPORTED, *unknown) if raw.get(name)), None):
        raise UserError(f"{path}: {name}: {_short(raw[name])} is not supported", _MERGE_IT)
    for name in ("r", "lora_alpha"):
        if not isinstance(raw.get(name, 1), int | float):
            raise UserError(f"{path}: {name}: {_short(raw[name])} is no number", "copy the adapter again")
    start = raw.get("init_lora_weights")
    if isinstance(start, str):
        refuse_changed_base(start, CHANGED_BASES[2:], folder)
    try:
        return LoraConfig(**{name: value for name, value in fields.items() if name != "peft_type"})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {_line(error)}", "copy the adapter again") from None


def refuse_changed_base(start: str, kinds: tuple[str, ...], folder: Path) -> None:
    """Raise UserError for an adapter whose initialization is one of `kinds`."""
    if start.lower().startswith(kinds):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights: {start} belongs to a base whose weights it has changed",
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA",
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by name.

    Raises UserError if the file is missing or damaged, CheckFailed if a number in it is not finite.
    """
    file = folder / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
    except FileNotFoundError:
        raise _missing(folder) from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: damaged or cut short ({error})", "copy the adapter again") from None
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckFailed(
                f"{folder}: the adapter holds numbers that are not finite, in {name}",
                "train it again with a lower train.learning_rate, or use a checkpoint of the run",
            )
    return weights


def parse(weights: dict[str, Tensor], settings: LoraConfig, folder: Path) -> Adapter:
    """The parts of an adapter, of its tensors. Raises UserError for names that are none, and factors without their other half."""
    found, parts = Adapter(), dict[str, dict[str, Tensor]]()
    whole = tuple(settings.modules_to_save or ())
    for name, tensor in weights.items():
        short = name.removeprefix(PREFIX)
        ends = _ENDS.fullmatch(short)
        if short == name or (".lora_" in short and (ends is None or ends["factor"] is None)):
            raise misfit(folder, f"unexpected: {name}")
        if ends is None:
            belongs = _is_in(short.rpartition(".")[0], whole)
            (found.own if belongs else found.base)[short] = tensor
        elif ends["factor"]:
            parts.setdefault(ends["module"], {})[ends["factor"]] = tensor
        elif ends["rows"]:
            found.rows[ends["module"]] = (tokens_of(ends["module"], settings), tensor)
        elif ends["own"]:
            found.own.setdefault(f"{ends['module']}.{ends['own']}", tensor)
        else:
            found.base[f"{ends['module']}.{ends['base']}"] = tensor
    for module, tensors in parts.items():
        ends_of_kind = "lora_embedding_{}" if "lora_embedding_A" in tensors else "lora_{}.weight"
        for half in "AB":
            if ends_of_kind.format(half) not in tensors:
                raise misfit(folder, f"missing: {PREFIX}{module}.{ends_of_kind.format(half)}")
        made = Factors(**{_FACTORS[end]: tensor for end, tensor in tensors.items()})
        table = "lora_embedding_A" in tensors
        if settings.use_dora and made.magnitude is None:
            raise misfit(folder, f"missing: {PREFIX}{module}.lora_magnitude_vector")
        (found.tables if table else found.matrices)[module] = made
    return found


def unparse(adapter: Adapter) -> dict[str, Tensor]:
    """The inverse of `parse`: tensors by the names PEFT gives them."""
    found: dict[str, Tensor] = {}
    for embedding, factors in ((False, adapter.matrices), (True, adapter.tables)):
        for module, one in factors.items():
            ends = (
                ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            )
            found |= {f"{module}.{ends[0]}": one.a, f"{module}.{ends[1]}": one.b}
            if one.magnitude is not None:
                found[f"{module}.lora_magnitude_vector"] = one.magnitude
            if one.bias is not None:
                found[f"{module}.lora_B.bias"] = one.bias
    for module, (_, values) in adapter.rows.items():
        found[f"{module}.token_adapter.trainable_tokens_delta"] = values
    found |= adapter.own | adapter.base
    return {PREFIX + name: tensor.contiguous() for name, tensor in found.items()}


def tokens_of(module: str, settings: LoraConfig) -> list[int]:
    """The tokens whose rows of a module `trainable_token_indices` trains."""
    named = settings.trainable_token_indices
    if isinstance(named, dict):
        return list(next((tokens for name, tokens in named.items() if _is_in(module, [name])), []))
    return list(named or [])


def _is_in(module: str, named: Iterable[str]) -> bool:
    """Whether a module is one of those named, by its last words, or inside of one."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in named)


def table_rows(folder: Path) -> dict[str, int | list[int]]:
    """What an adapter says of the vocabulary: last word of a table -> its rows, or the tokens it has rows for.

    Only names and shapes are read. Empty for an adapter that leaves the tables as the base has them.
    """
    shapes = _shapes(folder)
    named = read_json(folder / ADAPTER_CONFIG).get("trainable_token_indices")
    found: dict[str, int | list[int]] = {}
    for name, shape in shapes.items():
        ends = _ENDS.fullmatch(name.removeprefix(PREFIX))
        module = ends["module"] if ends else name.removeprefix(PREFIX).removesuffix(".weight")
        last = module.rpartition(".")[2]
        if last not in (*EMBEDDINGS, HEAD):
            continue
        table = HEAD if last == HEAD else EMBEDDINGS[0]
        if ends and ends["rows"]:
            tokens = (
                next((t for n, t in named.items() if _is_in(module, [n])), [])
                if isinstance(named, dict)
                else named
            )
            found.setdefault(table, list(tokens or []))
        elif not (ends and ends["factor"]) and len(shape) == 2:
            found[table] = shape[0]
    return found


def _shapes(folder: Path) -> dict[str, list[int]]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise _missing(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({error})", "copy the adapter again") from None


def misfit(folder: Path, how: str) -> UserError:
    """The error for an adapter whose tensors are not what its config and its base ask for."""
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    made = (run_of(folder) or {}).get("parents")
    return UserError(
        f"{folder}: the adapter does not fit this base ({how})",
        # a base that a run has written down was found by its hash
        "copy the adapter again"
        if made or not named
        else f"was it trained on {named}? base_model_name_or_path in its {ADAPTER_CONFIG} says so",
    )


def _missing(folder: Path) -> UserError:
    if (folder / "adapter_model.bin").is_file():
        return UserError(
            f"{folder}: adapter_model.bin is a pickle, which can run code, and is not read",
            f"save the adapter again as {ADAPTER_WEIGHTS}: PEFT's save_pretrained does",
        )
    return UserError(f"{folder}: no {ADAPTER_WEIGHTS}", "copy the adapter again")


_MERGE_IT = "merge the adapter with PEFT, and use the merged model"


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _line(error: Exception) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[-1].rstrip(".") if said else type(error).__name__
