"""From a folder to a model in memory, and from an architecture to a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from llmctl.errors import UserError
from llmctl.files import read_json, write_json
from llmctl.kernels.quantized import Quantized
from llmctl.locate import locate
from llmctl.model.compressed import Scheme, layers_in, read_layer, scheme_in, stored
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import CARRIED, FAMILIES, config_in
from llmctl.model.hf import LlmctlForCausalLM, LlmctlPreTrainedModel
from llmctl.model.init import initialize
from llmctl.model.keymap import Rule, load_one, to_core
from llmctl.model.leaves import leaves, swap
from llmctl.model.packed import PackedLinear, settle
from llmctl.recipe.model import ModelSection
from llmctl.runs import run_of

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# buffers that old checkpoints carry and no model needs
DROPPED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
# end of a class's name -> what it is, and what to do with it where another is needed
KINDS = {
    "ForCausalLM": ("a language model", "`llmctl reward` makes a reward model of it"),
    "ForSequenceClassification": ("a reward model", "`llmctl score` reads it; give a language model here"),
}
M = TypeVar("M", bound=LlmctlPreTrainedModel)
Quantization = Literal["refuse", "fast", "exact"]


def new_model(spec: ModelSection, seed: int, **ids: Any) -> LlmctlForCausalLM:
    """A model with fresh float32 weights on the CPU, the same for the same seed everywhere.

    `ids` are bos_token_id, eos_token_id (an int or a list) and pad_token_id.
    """
    model = _empty(LlmctlConfig.of(spec.resolved(), **ids), LlmctlForCausalLM)
    model.to_empty(device="cpu")
    model.tie_weights()
    initialize(model, spec, seed)
    model.generation_config = GenerationConfig(**ids)
    return model


def load_model(
    where: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kind: type[M] = LlmctlForCausalLM,  # type: ignore[assignment]  # mypy knows no defaults of type variables
    *,
    quantized: Quantization = "refuse",
) -> M:
    """The model in a run folder, a Hugging Face folder or on the hub.

    Args:
        dtype: of the weights; the checkpoint's own when None. Quantized layers stay packed.
        kind: which of our classes it is: what stands on the backbone.
        quantized: quantized layers are refused, since nothing can be trained on them or added to them, or
            compute by their fastest path, or exactly as stored.

    Raises:
        UserError: no such folder or file, an unsupported architecture or another kind of model, a file
            that is not safetensors or was cut short, tensors that are missing, unexpected or of another
            shape.
    """
    folder = locate(str(where), FILES)
    config = config_in(folder)
    _refuse_other_kind(folder, config, kind)
    name = config.spec.family
    scheme = _scheme(folder, quantized)
    model = _empty(config, kind)
    with ExitStack() as stack:
        tensors = _open_weights(folder, stack)
        if scheme is not None:
            tensors = _fill_packed(model, tensors, scheme, folder)
        _fill(
            model,
            tensors,
            FAMILIES[name].rules(config.spec) if name in FAMILIES else (),
            dtype,
            device,
            folder,
        )
    model.tie_weights()
    settle(model, torch.device(device), exact=quantized == "exact")
    if model.can_generate():
        model.generation_config = _generation_config(folder, config)
    return model.eval()


def load_config(where: str | Path) -> LlmctlConfig:
    """The config of a model, without its weights. Raises UserError as `load_model` does."""
    return config_in(locate(str(where), FILES))


@torch.no_grad()
def load_weights(model: LlmctlPreTrainedModel, folder: Path) -> None:
    """Copy the weights of a checkpoint of the same model into `model`, in place, so optimizers keep hold of them."""
    saved = load_model(folder, kind=type(model))
    for (name, weight), (_, new) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        if weight.shape != new.shape:
            raise UserError(f"{folder}: tensor {name} has another shape than in this run", "start a new run")
        weight.copy_(new)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` without its progress bars: config, weights and generation config into `folder`."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def save_quantized(
    model: LlmctlPreTrainedModel, matrices: Mapping[str, Quantized], scheme: Scheme, folder: Path
) -> None:
    """Write a model with some of its leaves quantized, into `folder`, in shards if it is large.

    Args:
        model: every other weight is written as it is.
        matrices: leaf name -> what is stored in its place, all of one scheme.

    Raises UserError if the model's family has tensors of another form than ours, which cannot be packed.
    """
    fields, rules = model.disk_form()
    if rules:
        raise UserError(
            f"{fields['model_type']}: quantized checkpoints of this architecture are not written",
            "supported are those whose tensors have Llama's names",
        )
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    gone = tied | {f"{name}.weight" for name in matrices}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in gone}
    for name, matrix in matrices.items():
        tensors |= stored(name, matrix)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    whole = [leaf.name for leaf in leaves(model) if leaf.name not in matrices]
    write_json(folder / "config.json", fields | {"quantization_config": scheme.to_config(whole)})
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _empty(config: LlmctlConfig, kind: type[M]) -> M:
    with torch.device("meta"):
        return kind(config)


def _scheme(folder: Path, quantized: Quantization) -> Scheme | None:
    scheme = scheme_in(read_json(folder / "config.json"), str(folder / "config.json"))
    if scheme is not None and quantized == "refuse":
        parents = (run_of(folder) or {}).get("parents", [])
        origin = next((parent["path"] for parent in parents if parent["role"] == "model"), None)
        raise UserError(
            f"{folder}: the weights are quantized, and this needs whole ones",
            f"use the model they were made from{f', {origin}' if origin else ''}",
        )
    return scheme


def _fill_packed(model: nn.Module, tensors: dict[str, Any], scheme: Scheme, folder: Path) -> dict[str, Any]:
    """Put the quantized layers of a checkpoint in their places; returns the tensors that are left."""
    known = {leaf.name: leaf for leaf in leaves(model)}
    used: set[str] = set()

    def read(name: str) -> Tensor:
        used.add(name)
        return tensors[name].get_tensor(name)

    for name in layers_in(tensors):
        if name not in known:
            continue  # told as unexpected, with the rest
        matrix = read_layer(name, known[name].shape, scheme, read, folder)
        swap(model, name, PackedLinear(matrix, known[name].module.bias))
    return {name: file for name, file in tensors.items() if name not in used}


def _refuse_other_kind(folder: Path, config: LlmctlConfig, kind: type[LlmctlPreTrainedModel]) -> None:
    held = {end: name for name in config.architectures or [] for end in KINDS if name.endswith(end)}
    wanted = next((end for end in KINDS if kind.__name__.endswith(end)), None)
    if held and wanted not in held:
        end, name = next(iter(held.items()))
        raise UserError(
            f"{folder}: holds {KINDS[end][0]} ({name}), not {KINDS[wanted][0] if wanted else kind.__name__}",
            KINDS[end][1],
        )


def _generation_config(folder: Path, config: LlmctlConfig) -> GenerationConfig:
    path = folder / "generation_config.json"
    if path.is_file():
        return GenerationConfig.from_dict(read_json(path))
    ids = {key: getattr(config, key, None) for key in CARRIED}
    return GenerationConfig(**ids)


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> open safetensors file; nothing is read yet."""
    paths = [folder / WEIGHTS]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder}: no {WEIGHTS}", _hint_for_missing(folder))
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{folder / INDEX}: lists no weights", "copy or download the model again")
        paths = [folder / str(name) for name in sorted(set(names.values()))]
    tensors: dict[str, Any] = {}
    for path in paths:
        try:
            path.open("rb").close()  # safetensors calls every refusal of the system "not found"
            file = stack.enter_context(safe_open(path, framework="pt"))
            tensors |= dict.fromkeys(file.keys(), file)
        except FileNotFoundError:
            raise UserError(
                f"{path}: missing, though {INDEX} lists it", "copy or download it again"
            ) from None
        except PermissionError:
            raise UserError(f"{path}: no permission to read", "ask its owner, or copy the folder") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: damaged or cut short ({error})",
                "copy or download it again, or use a checkpoint of the run",
            ) from None
    return tensors


def _hint_for_missing(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "this folder holds an adapter, not a model"
    if any(folder.glob("*.bin")):
        return "only safetensors are read; pickled .bin files can run code"
    if any(folder.glob("checkpoints/step-*")):
        return "the run was not finished; go on with --resume, or name a folder under checkpoints/"
    return "copy or download the model again"


def _fill(
    model: nn.Module,
    tensors: dict[str, Any],
    rules: tuple[Rule, ...],
    dtype: torch.dtype | None,
    device: str | torch.device,
    folder: Path,
) -> None:
    plan = to_core([name for name in tensors if not name.endswith(DROPPED)], rules)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    _refuse(folder, "missing", sorted(wanted.keys() - plan.keys() - tied))
    _refuse(folder, "unexpected", sorted(plan.keys() - wanted.keys()))
    for name, parameter in _untied(wanted, tied):
        weight: Tensor = load_one(plan[name], lambda disk: tensors[disk].get_tensor(disk))
        if weight.shape != parameter.shape:
            found, needed = list(weight.shape), list(parameter.shape)
            raise UserError(
                f"{folder}: tensor {name} has shape {found}, but config.json asks for {needed}",
                "the weights belong to another config",
            )
        owner, leaf = name.rsplit(".", 1)
        if not weight.is_floating_point():
            raise UserError(f"{folder}: tensor {name} holds {weight.dtype}, not weights", "is it quantized?")
        filled = nn.Parameter(weight.to(device=device, dtype=dtype or weight.dtype))
        setattr(model.get_submodule(owner), leaf, filled)


def _untied(wanted: dict[str, nn.Parameter], tied: set[str]) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in wanted.items() if name not in tied)


def _refuse(folder: Path, how: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(f"{folder}: {how} tensors: {shown}", "the weights do not belong to this config.json")
