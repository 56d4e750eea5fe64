"""LoRA as a pass over a finished model (Hu et al. 2021, arXiv:2106.09685), by way of PEFT.

PEFT takes seconds to import, so it is imported where it is used. What is saved is PEFT's own format:
`adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from llmctl.errors import UserError, nearest, one_of
from llmctl.files import read_json
from llmctl.intact import refuse_damaged
from llmctl.model.adapter_file import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHANGED_BASES,
    PREFIX,
    Adapter,
    is_adapter,
    misfit,
    parse,
    read_settings,
    read_weights,
    refuse_changed_base,
    unparse,
)
from llmctl.model.adapter_fit import check_fit, named_parameters_of, with_depths
from llmctl.model.adapter_names import Names, in_core, in_family, names_of
from llmctl.model.adapter_settings import for_core, for_family
from llmctl.model.families import FAMILIES, write_config
from llmctl.model.hf import LlmctlForCausalLM, LlmctlPreTrainedModel
from llmctl.model.leaves import leaves
from llmctl.model.vocabulary import tie, untie
from llmctl.runs import run_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "is_adapter"]  # and what is defined here

ALL_LINEAR = "all-linear"
TASKS = {"causal": "CAUSAL_LM", "reward": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}


def target_names(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """The last words of the leaves that LoRA goes on: all but the output head, or those named.

    Raises UserError if a name matches no leaf (the names there are are listed), or is the head.
    """
    known: dict[str, set[str]] = {}
    for leaf in leaves(model):
        known.setdefault(leaf.kind, set()).add(leaf.name.rsplit(".", 1)[-1])
    linear = sorted(known.get("linear", ()))
    if wanted == ALL_LINEAR:
        return linear
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name in known.get("head", ()):
            raise UserError(
                f"lora.target_modules: `{name}` is the output head, which stays as it is",
                f"name layers inside the blocks: {one_of(linear)}",
            )
        if name not in linear:
            close = nearest(name, [ALL_LINEAR, *linear])
            raise UserError(
                f"lora.target_modules: `{name}` matches no layer; there is {one_of(linear)}",
                f"did you mean `{close}`?" if close else f"`{ALL_LINEAR}` takes them all",
            )
    return [wanted] if isinstance(wanted, str) else list(wanted)


def add_lora(
    model: LlmctlPreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    tokens: Sequence[int] = (),
    base: str = "",
    task: str = "causal",
) -> PeftModel:
    """The model with LoRA on its leaves; everything else is frozen.

    Args:
        tokens: rows of the embedding table (and of the head) that are trained too, because the base
            model never saw them.
        base: what to write down as the model this adapter belongs to.
        task: causal, seq2seq, or reward, whose score head is trained and saved whole.
    """
    from peft import LoraConfig, get_peft_model

    from llmctl.model.lora_layer import fuse

    rows: list[int] | dict[str, list[int]] | None = list(tokens) or None
    if rows and not model.config.tie_word_embeddings and task != "reward":
        # a plain list would train the embedding and leave the head's rows as they are
        rows = {"embed_tokens": list(tokens), "lm_head": list(tokens)}
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_names(model, target_modules),
        trainable_token_indices=rows,
        modules_to_save=["score"] if task == "reward" else None,
        task_type=TASKS[task],
        base_model_name_or_path=base,
    )
    model.name_or_path = base  # what PEFT writes down, whatever the config says
    found = get_peft_model(model, config)
    fuse(found)
    _mark(model)
    return found


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen matrices in the precision they are multiplied in.

    Autocast would round them to it at every product, with the same result; trained weights, norms
    and the embedding table stay as they are.
    """
    for leaf in leaves(model):
        frozen = not leaf.module.weight.requires_grad and leaf.module.weight.dtype == torch.float32
        if leaf.kind == "linear" and frozen and ".lora_" not in leaf.name:
            leaf.module.to(dtype)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's config and weights into a folder, in the names of the base's family, as PEFT would there."""
    base, settings = model.get_base_model(), model.peft_config["default"]
    names = names_of(base)
    # left to itself, PEFT would look for the base, on the hub too, and save embeddings that have grown
    if names.same:
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        return
    adapter = in_family(_adapter_of(model), names)
    for_family(settings, adapter, names).save_pretrained(str(folder))
    save_file(unparse(with_depths(adapter, names)), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def refused_elsewhere(model: PeftModel) -> str | None:
    """Why PEFT does not put this adapter on transformers' class of the base; None where it does."""
    name, _ = write_config(model.get_base_model().config)
    unadapted = FAMILIES[name].unadapted if name in FAMILIES else ()
    refused = sorted(
        {leaf.name.split(".lora_")[0].rpartition(".")[2] for leaf in leaves(model) if ".lora_A" in leaf.name}
        & set(unadapted)
    )
    return f"PEFT adapts no `{refused[0]}` of {name}" if refused else None


def _adapter_of(model: PeftModel) -> Adapter:
    """The adapter of a model, in the core's names."""
    from peft import get_peft_model_state_dict

    settings = model.peft_config["default"]
    found = parse(get_peft_model_state_dict(model, save_embedding_layers=False), settings, Path())
    for factors in found.matrices.values():
        factors.alpha = settings.lora_alpha
    return found


@torch.no_grad()
def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Copy saved adapter weights into a model that has the same adapter, in place.

    Raises UserError if the file is missing, damaged or of another adapter.
    """
    inside = _adapter_of(model)
    adapter, _, names = _read(model.get_base_model(), folder)
    ranks = {module: factors.r for module, factors in inside.matrices.items()}
    _copy(in_core(adapter, names, ranks=ranks), model, folder)


def attach(model: LlmctlPreTrainedModel, folder: Path) -> PeftModel:
    """The model with a saved adapter on it, in place; `get_base_model()` is the model, now computing with it.

    Raises:
        UserError: not an adapter PEFT knows, damaged, not what its run wrote, or one whose shapes belong to another model.
        CheckFailed: a weight of it is not a finite number.
    """
    from peft import get_peft_model

    adapter, settings, names = _read(model, folder)
    refuse_damaged(folder)
    if isinstance(settings.init_lora_weights, str) and not names.same:
        refuse_changed_base(settings.init_lora_weights, CHANGED_BASES, folder)
    core = in_core(adapter, names, settings.use_rslora)
    _place(core, model, settings, folder)
    with warnings.catch_warnings():
        # tied tables that differ: what is folded unties them
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        found = get_peft_model(model, for_core(settings, core, model))
    _copy(core, found, folder)
    _mark(found.get_base_model())
    return found.eval()


def _read(model: LlmctlPreTrainedModel, folder: Path) -> tuple[Adapter, LoraConfig, Names]:
    """The adapter in a folder, its settings, and the names it is in, which fit the model."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    settings = read_settings(folder)
    names = names_of(model)
    # PEFT ties nothing where the table has a name it does not know, such as GPT-2's
    known = any(module.rpartition(".")[2] == EMBEDDING_LAYER_NAMES[0] for module in names.steps)
    settings.ensure_weight_tying &= known and model.config.tie_word_embeddings
    read = parse(read_weights(folder), settings, folder)
    adapter = named_parameters_of(read, settings, names)
    if not names.same and run_of(folder) is not None:
        # runs used to write the core's names, whatever the family
        plain = names_of(model, core=True)
        if (
            adapter.matrices.keys() <= plain.steps.keys()
            and not adapter.matrices.keys() <= names.steps.keys()
        ):
            adapter, names = read, plain
    check_fit(adapter, settings, names, folder)
    return adapter, settings, names


def _copy(adapter: Adapter, model: PeftModel, folder: Path) -> None:
    """Copy an adapter in the core's names into a model that has a place for each of its weights."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    has = get_peft_model_state_dict(model, save_embedding_layers=False)
    given = {name: tensor for name, tensor in unparse(adapter).items() if name in has or ".lora_" in name}
    for how, names in (("missing", has.keys() - given.keys()), ("unexpected", given.keys() - has.keys())):
        if names:
            raise misfit(folder, f"{how}: {min(names)}")
    for name, tensor in given.items():
        if has[name].shape != tensor.shape:
            raise misfit(
                folder, f"{name} has shape {list(tensor.shape)}, but here it is {list(has[name].shape)}"
            )
    set_peft_model_state_dict(model, given)


@torch.no_grad()
def _place(adapter: Adapter, model: LlmctlPreTrainedModel, settings: LoraConfig, folder: Path) -> None:
    """Give a model the tensors that stand in an adapter's file in the place of its own: tables, heads, biases."""
    state = model.state_dict(keep_vars=True)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for name, tensor in (adapter.base | adapter.own).items():
        if name not in state:
            raise misfit(folder, f"unexpected: {PREFIX}{name}")
        if state[name].shape != tensor.shape:
            raise misfit(
                folder,
                f"{PREFIX}{name} has shape {list(tensor.shape)}, but this base asks for {list(state[name].shape)}",
            )
    for name, tensor in adapter.base.items():
        state[name].copy_(tensor)
    apart = [name for name in tables if name in adapter.own]
    if apart and model.config.tie_word_embeddings and not settings.ensure_weight_tying:
        untie(model)
        state = model.state_dict(keep_vars=True)
    for name, tensor in adapter.own.items():
        state[name].copy_(tensor)


def fold(model: PeftModel) -> LlmctlPreTrainedModel:
    """The model with its adapter added into its weights, in place, and no trace of PEFT left.

    A head that is tied to the embedding table gets a table of its own if the adapter makes the two differ.

    Raises UserError if the adapter adds a bias that the model has no place for.
    """
    base = model.get_base_model()
    _refuse_new_biases(model)
    has_head = base.get_output_embeddings() is not None
    apart = has_head and base.config.tie_word_embeddings and _adapts_tables(base)
    together = model.peft_config["default"].ensure_weight_tying
    if apart:
        untie(base)
    folded = model.merge_and_unload(safe_merge=True)
    if apart:
        table, head = folded.get_input_embeddings().weight, folded.get_output_embeddings().weight
        if together or torch.equal(table, head):
            tie(folded)
    if isinstance(folded, LlmctlForCausalLM):
        folded.head_reads_as_matrix, folded.head_by_rows = False, None
    return folded.requires_grad_(True)  # PEFT had frozen it


def _adapts_tables(model: LlmctlPreTrainedModel) -> bool:
    """Whether PEFT has put a module of its own around the embedding table or the head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(type(table) not in (nn.Embedding, nn.Linear) for table in tables if table is not None)


def can_fold(folder: Path) -> bool:
    """Whether an adapter can be folded into any base; one with `lora_bias` needs a base with biases."""
    return not read_json(folder / ADAPTER_CONFIG).get("lora_bias")


def _refuse_new_biases(model: PeftModel) -> None:
    if not model.peft_config["default"].lora_bias:
        return
    from peft.tuners.lora import Linear

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, Linear) and module.get_base_layer().bias is None:
            raise UserError(
                f"{ADAPTER_CONFIG}: lora_bias adds a bias to {name}, which has none, so it cannot be folded in",
                "every command but merge, quantize and training uses the adapter as it is",
            )


def _mark(model: LlmctlPreTrainedModel) -> None:
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(model, LlmctlForCausalLM):
        by_rows = isinstance(model.lm_head, TrainableTokensWrapper)
        # a head with a low-rank update is more than its matrix; trained rows show in its `weight`
        model.head_reads_as_matrix = type(model.lm_head) is nn.Linear or by_rows
        if by_rows:
            model.head_by_rows = partial(_by_rows, model.lm_head)


def _by_rows(head: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The head as it was, with indices and values of its trained rows. PEFT's `weight` is a copy of all of it."""
    layer = head.token_adapter
    if head.disable_adapters:
        return layer.base_layer.weight, None
    (name,) = head.active_adapters
    values = layer.trainable_tokens_delta[name]
    return layer.base_layer.weight, (torch.tensor(layer.token_indices[name], device=values.device), values)
