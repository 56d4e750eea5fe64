"""LoRA as a pass over a finished model (Hu et al. 2021, arXiv:2106.09685), by way of PEFT.

PEFT takes seconds to import, so it is imported where it is used. What is saved is PEFT's own format:
`adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from llmctl.errors import CheckFailed, UserError, nearest, one_of
from llmctl.files import read_json
from llmctl.model.hf import LlmctlForCausalLM, LlmctlPreTrainedModel
from llmctl.model.leaves import leaves

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
TASKS = {"causal": "CAUSAL_LM", "reward": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


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
    """Write the adapter's config and weights into a folder."""
    # left to itself, PEFT would look for the base, on the hub too, and save embeddings that have grown
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


@torch.no_grad()
def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Copy saved adapter weights into a model that has the same adapter, in place.

    Raises UserError if the file is missing, damaged or of another adapter.
    """
    from peft import set_peft_model_state_dict

    weights = _read_weights(folder)
    _refuse_other_names(model, weights, folder)
    with _fitting(folder):
        set_peft_model_state_dict(model, weights)


def attach(model: LlmctlPreTrainedModel, folder: Path) -> PeftModel:
    """The model with a saved adapter on it, in place; `get_base_model()` is the model, now computing with it.

    Raises:
        UserError: not an adapter PEFT knows, damaged, or one whose shapes belong to another model.
        CheckFailed: a weight of it is not a finite number.
    """
    from peft import PeftModel

    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{folder}: adapter of kind {settings.get('peft_type')} is not supported", "LoRA adapters are"
        )
    weights = _read_weights(folder)  # a damaged file should be told as such
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckFailed(
                f"{folder}: the adapter holds numbers that are not finite, in {name}",
                "train it again with a lower train.learning_rate, or use a checkpoint of the run",
            )
    with _fitting(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error, below
        found = PeftModel.from_pretrained(model, str(folder))
    _refuse_other_names(found, weights, folder)
    _mark(found.get_base_model())
    return found.eval()


def fold(model: PeftModel) -> LlmctlPreTrainedModel:
    """The model with its adapter added into its weights, in place, and no trace of PEFT left."""
    folded = model.merge_and_unload(safe_merge=True)
    if isinstance(folded, LlmctlForCausalLM):
        folded.head_reads_as_matrix, folded.head_by_rows = False, None
    return folded.requires_grad_(True)  # PEFT had frozen it


def _mark(model: LlmctlPreTrainedModel) -> None:
    from peft.utils.other import TrainableTokensWrapper

    # the head is never a LoRA layer here; trained rows show in its `weight`
    if isinstance(model, LlmctlForCausalLM):
        model.head_reads_as_matrix = True
        if isinstance(model.lm_head, TrainableTokensWrapper):
            model.head_by_rows = partial(_by_rows, model.lm_head)


def _by_rows(head: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The head as it was, with indices and values of its trained rows. PEFT's `weight` is a copy of all of it."""
    layer = head.token_adapter
    if head.disable_adapters:
        return layer.base_layer.weight, None
    (name,) = head.active_adapters
    values = layer.trainable_tokens_delta[name]
    return layer.base_layer.weight, (torch.tensor(layer.token_indices[name], device=values.device), values)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn what PEFT raises for an adapter of another model into a UserError."""
    try:
        yield
    except KeyError as error:  # a weight it looked for by name
        raise _misfit(folder, f"missing: {error.args[0]}") from None
    except (RuntimeError, ValueError, TypeError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _misfit(folder, said[-1].rstrip(".") if said else type(error).__name__) from None


def _refuse_other_names(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise UserError if weights are missing, which PEFT would leave as they were, or have no place."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # others save the whole embedding table beside the adapter
    extra = weights.keys() - wanted - {name for name, _ in model.named_parameters()}
    for how, names in (("missing", wanted - weights.keys()), ("unexpected", extra)):
        if names:
            raise _misfit(folder, f"{how}: {min(names)}")


def _misfit(folder: Path, how: str) -> UserError:
    return UserError(
        f"{folder}: the adapter does not fit this base ({how})", "use the base it was trained on"
    )


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / ADAPTER_WEIGHTS
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{folder}: no {ADAPTER_WEIGHTS}", "copy the adapter again") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: damaged or cut short ({error})", "copy the adapter again") from None
