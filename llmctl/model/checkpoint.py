"""From a folder to a model in memory, and from an architecture to a new one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from llmctl.errors import UserError
from llmctl.files import read_json, write_json
from llmctl.intact import Check
from llmctl.kernels.quantized import Quantized
from llmctl.locate import locate
from llmctl.model.compressed import Scheme, layers_in, read_layer, scheme_in, stored
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import FAMILIES, carried, config_in, write_config
from llmctl.model.families.row import Family
from llmctl.model.generation import StoredGenerationConfig, read_generation_config
from llmctl.model.hf import LlmctlForCausalLM, LlmctlPreTrainedModel
from llmctl.model.init import initialize
from llmctl.model.keymap import to_core, to_disk
from llmctl.model.leaves import leaves, swap
from llmctl.model.masked import LlmctlForMaskedLM
from llmctl.model.packed import PackedLinear, settle
from llmctl.model.seq2seq import LlmctlForConditionalGeneration
from llmctl.model.tying import refuse_missing_head, table_from_head, tied_as_stored, tied_in
from llmctl.model.weights import PICKLED, PICKLED_INDEX, Stored, open_weights
from llmctl.recipe.model import ModelSection
from llmctl.runs import refuse_refused, run_of

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
PICKLES = [PICKLED, PICKLED_INDEX, "pytorch_model-*.bin"]
# buffers that old checkpoints carry and no model needs
DROPPED = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
BACKBONE = "Model"
ENCODER_HINT = "an encoder reads both ways and writes nothing; give a language model here"
PAIR_HINT = "in Python, LlmctlForConditionalGeneration opens it; give a language model here"
# end of a class's name -> what it is, and what to do with it where another is needed
KINDS = {
    "ForCausalLM": ("a language model", "`llmctl reward` makes a reward model of it"),
    "ForSequenceClassification": ("a reward model", "`llmctl score` reads it; give a language model here"),
    "ForMaskedLM": ("a masked language model", ENCODER_HINT),
    "ForConditionalGeneration": ("an encoder–decoder", PAIR_HINT),
    BACKBONE: ("a backbone without a head", "give the whole model it was taken from"),
}
# stack -> the class of a new model, what it is called where another is needed, and what to do then
STACKS: dict[str, tuple[type[LlmctlPreTrainedModel], str, str]] = {
    "decoder": (LlmctlForCausalLM, "a decoder", "give a model of another kind here"),
    "encoder": (LlmctlForMaskedLM, "an encoder", ENCODER_HINT),
    "encoder_decoder": (LlmctlForConditionalGeneration, "an encoder–decoder", PAIR_HINT),
}
M = TypeVar("M", bound=LlmctlPreTrainedModel)
Quantization = Literal["refuse", "fast", "exact"]


def new_model(spec: ModelSection, seed: int, **ids: Any) -> LlmctlForCausalLM:
    """A model with fresh float32 weights on the CPU, the same for the same seed everywhere.

    `ids` are bos_token_id, eos_token_id (an int or a list) and pad_token_id.
    """
    return _new(LlmctlForCausalLM, spec, seed, ids)


def new_of_stack(spec: ModelSection, seed: int, **ids: Any) -> LlmctlPreTrainedModel:
    """As `new_model`, of the class that goes with `spec.stack`: a masked language model, an encoder–decoder.

    `ids` of an encoder–decoder are decoder_start_token_id too.
    """
    return _new(STACKS[spec.stack][0], spec, seed, ids)


def _new(kind: type[M], spec: ModelSection, seed: int, ids: dict[str, Any]) -> M:
    model = _empty(LlmctlConfig.of(spec.resolved(), **ids), kind)
    model.to_empty(device="cpu")
    model.tie_weights()
    initialize(model, spec, seed)
    if model.can_generate():
        model.generation_config = StoredGenerationConfig(**ids)
    return model


def load_model(
    where: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kind: type[M] = LlmctlForCausalLM,  # type: ignore[assignment]  # mypy knows no defaults of type variables
    *,
    quantized: Quantization = "refuse",
    allow_pickle: bool = False,
) -> M:
    """The model in a run folder, a Hugging Face folder or on the hub.

    Args:
        dtype: of the weights; the checkpoint's own when None. Quantized layers stay packed.
        kind: which of our classes it is: what stands on the backbone.
        quantized: quantized layers are refused, since nothing can be trained on them or added to them, or
            compute by their fastest path, or exactly as stored.
        allow_pickle: read `pytorch_model.bin` where there are no safetensors.

    Raises:
        UserError: no such folder or file, an unsupported architecture or another kind of model, a file
            that is not safetensors (or an allowed pickle) or was cut short, tensors that are missing,
            unexpected or of another shape; a run whose result was refused, or is not what it wrote.
    """
    folder = locate(str(where), FILES + PICKLES if allow_pickle else FILES)
    refuse_refused(folder)
    check = Check(folder)
    config = config_in(folder)
    _refuse_other_kind(folder, config, kind)
    family = FAMILIES.get(config.spec.family)
    scheme = _scheme(folder, quantized)
    with ExitStack() as stack:
        tensors = open_weights(folder, stack, allow_pickle)
        model = _empty(tied_as_stored(config, tensors, folder), kind)
        tensors = table_from_head(config, tensors)
        if scheme is not None:
            tensors = _fill_packed(model, tensors, scheme, folder)
        _fill(model, tensors, family, dtype, device, folder)
    check.finish()
    model.tie_weights()
    settle(model, torch.device(device), exact=quantized == "exact")
    if model.can_generate():
        model.generation_config = read_generation_config(folder, carried(config))
    return model.eval()


def load_config(where: str | Path) -> LlmctlConfig:
    """The config of a model, without its weights. Raises UserError as `load_model` does."""
    folder = locate(str(where), FILES)
    refuse_refused(folder)
    return tied_in(folder, config_in(folder))


@torch.no_grad()
def load_weights(model: LlmctlPreTrainedModel, folder: Path) -> None:
    """Copy the weights of a checkpoint of the same model into `model`, in place, so optimizers keep hold of them."""
    saved = load_model(folder, kind=type(model)).state_dict()
    for name, value in model.state_dict().items():  # saved buffers too
        if name not in saved or value.shape != saved[name].shape:
            raise UserError(f"{folder}: tensor {name} has another shape than in this run", "start a new run")
        value.copy_(saved[name])


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

    Raises UserError as `refuse_reshaped`.
    """
    refuse_reshaped(model.config)
    fields, _ = model.disk_form()
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


def refuse_reshaped(config: LlmctlConfig) -> None:
    """Raise UserError if a model is saved with tensors of another form than ours, which cannot be packed."""
    name, _ = write_config(config)
    if name in FAMILIES and FAMILIES[name].rules(config.spec):
        raise UserError(
            f"{name}: quantized checkpoints of this architecture are not written",
            "`llmctl convert MODEL --family llmctl` writes it with tensors of Llama's names, which can be",
        )


def _empty(config: LlmctlConfig, kind: type[M]) -> M:
    with torch.device("meta"):
        return kind(config)


def _scheme(folder: Path, quantized: Quantization) -> Scheme | None:
    scheme = scheme_in(read_json(folder / "config.json"), str(folder / "config.json"))
    if scheme is not None and quantized == "refuse":
        parents = (run_of(folder) or {}).get("parents") or []
        origin = next((parent["path"] for parent in parents if parent["role"] == "model"), None)
        raise UserError(
            f"{folder}: the weights are quantized, and this needs whole ones",
            f"use the model they were made from{f', {origin}' if origin else ''}",
        )
    return scheme


def _fill_packed(
    model: nn.Module, tensors: dict[str, Stored], scheme: Scheme, folder: Path
) -> dict[str, Stored]:
    """Put the quantized layers of a checkpoint in their places; returns the tensors that are left."""
    known = {leaf.name: leaf for leaf in leaves(model)}
    used: set[str] = set()

    def read(name: str) -> Tensor:
        used.add(name)
        return tensors[name].mapped()

    for name in layers_in(tensors):
        if name not in known:
            continue  # told as unexpected, with the rest
        matrix = read_layer(name, known[name].shape, scheme, read, folder)
        swap(model, name, PackedLinear(matrix, known[name].module.bias))
    return {name: file for name, file in tensors.items() if name not in used}


def head_in(config: LlmctlConfig) -> tuple[str, str] | None:
    """The key of `KINDS` for what `config.json` says a model is, and the class that it names; None if it names none."""
    family = FAMILIES.get(config.spec.family)
    plain, prefix = (family.plain_name, family.prefix) if family else (str, "Llmctl")
    listed = [config.architectures] if isinstance(config.architectures, str) else config.architectures or []
    # a name of another family says nothing of this one: transformers goes by model_type
    names = [name for name in listed if name.startswith((prefix, "Llmctl"))]
    found = [(end, name) for name in names for end in KINDS if plain(name).endswith(end)]
    return next((held for held in found if held[0] != BACKBONE), found[0] if found else None)


def _refuse_other_kind(folder: Path, config: LlmctlConfig, kind: type[LlmctlPreTrainedModel]) -> None:
    held = head_in(config)
    wanted = next((end for end in KINDS if kind.__name__.endswith(end)), None)
    needed = KINDS[wanted][0] if wanted else kind.__name__
    if held and wanted not in (held[0], BACKBONE):  # which every model has
        end, name = held
        raise UserError(f"{folder}: holds {KINDS[end][0]} ({name}), not {needed}", KINDS[end][1])
    if config.spec.stack not in kind.stacks:
        _, name, hint = STACKS[config.spec.stack]
        raise UserError(f"{folder}: holds {name}, not {needed}", hint)


def _fill(
    model: LlmctlPreTrainedModel,
    tensors: dict[str, Stored],
    family: Family | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    folder: Path,
) -> None:
    """Give every parameter and saved buffer what the files hold; each is in memory at most once."""
    family = family or Family("Llmctl")
    rules = family.rules(model.config.spec)
    # what quantized layers hold is not on the meta device, and no longer wanted
    # files hold whole models: a backbone is named by its place in one
    place = "model." if model.base_model is model else ""
    state = model.state_dict(keep_vars=True).items()
    wanted = {place + name: value for name, value in state if value.is_meta}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    needed = to_disk(wanted, rules)  # on the meta device: names and shapes alone
    tensors = family.current_names(tensors, needed)
    if place:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(family.bare)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(DROPPED)}
    spare = to_disk({name: wanted[name] for name in tied & wanted.keys()}, rules)
    missing = sorted(needed.keys() - tensors.keys() - spare.keys())
    refuse_missing_head(model.config, missing, folder)
    _refuse(folder, "missing", missing)
    _refuse(folder, "unexpected", sorted(tensors.keys() - needed.keys()))
    _check(tensors, needed, folder)
    for step in to_core(tensors, rules):
        names = [name for name in step.core if name in wanted and name not in tied]
        if not names:
            continue
        kept = {name: _dtype_of(wanted[name], dtype) for name in names}
        found = tensors[step.disk[0]].mapped().dtype
        # a view of the file where it is what the model needs; else read, since mapped pages would stay beside
        as_is = torch.device(device).type == "cpu" and all(kind in (None, found) for kind in kept.values())
        get = Stored.read if step.rule.copies or not as_is else Stored.mapped
        values = step.load([get(tensors[name]) for name in step.disk])
        for name in names:
            value = values.pop(name).to(device=device, dtype=kept[name])
            owner, _, leaf = name.removeprefix(place).rpartition(".")
            is_weight = isinstance(wanted[name], nn.Parameter)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value) if is_weight else value)


def _dtype_of(target: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a tensor is stored as: buffers know it, weights are what is asked for, or as on disk (None)."""
    return dtype if isinstance(target, nn.Parameter) else target.dtype


def _check(tensors: dict[str, Stored], needed: dict[str, Tensor], folder: Path) -> None:
    """Hold what is on disk against what the config asks for, under the names of the files."""
    for name, tensor in tensors.items():
        found = tensor.mapped()
        if found.shape != needed[name].shape:
            raise UserError(
                f"{folder}: tensor {tensor.name} has shape {list(found.shape)}, "
                f"but config.json asks for {list(needed[name].shape)}",
                "the weights belong to another config",
            )
        if not found.is_floating_point():
            raise UserError(
                f"{folder}: tensor {tensor.name} holds {found.dtype}, not weights", "is it quantized?"
            )


def _refuse(folder: Path, how: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(f"{folder}: {how} tensors: {shown}", "the weights do not belong to this config.json")
