"""MODEL as every command takes it: a whole model, or an adapter, which is opened on its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from llmctl.errors import UserError
from llmctl.files import read_json
from llmctl.intact import refuse_damaged
from llmctl.locate import locate
from llmctl.model.adapter_file import ADAPTER_CONFIG, is_adapter, table_rows
from llmctl.model.adapter_fit import refuse_missing_rows, vocabulary_rows
from llmctl.model.adapters import TASKS, attach, fold
from llmctl.model.checkpoint import FILES, load_config, load_model
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import carried, dtype_named
from llmctl.model.generation import GENERATION_CONFIG, StoredGenerationConfig, read_generation_config
from llmctl.model.hf import LlmctlForCausalLM, LlmctlPreTrainedModel
from llmctl.model.nf4 import round_nf4
from llmctl.model.vocabulary import grow_vocabulary, resize_vocabulary
from llmctl.model.weights import dtype_in
from llmctl.runs import content_hash, find_by_hash, folder_hash, run_of

if TYPE_CHECKING:
    from peft import PeftModel

M = TypeVar("M", bound=LlmctlPreTrainedModel)


def open_model(
    where: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    exact: bool = False,
) -> LlmctlForCausalLM:
    """The model, to be used: with its adapter computing on its leaves if `where` is an adapter.

    Args:
        dtype: of the weights; when None the checkpoint's own, and float32 for an adapter.
        exact: quantized layers multiply by what is stored, as other readers do, not by their fastest path.

    Raises UserError: as `load_model`; an adapter whose base is gone, has changed or does not fit it, or
    that is one of a reward model.
    """
    folder = locate(str(where), FILES)
    if not is_adapter(folder):
        return load_model(folder, dtype, device, quantized="exact" if exact else "fast")
    model = open_adapter(folder, dtype).get_base_model()
    return model.to(device=device, dtype=dtype) if dtype else model.to(device)


def open_folded(
    where: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LlmctlForCausalLM:
    """As `open_model`, with the adapter added into the weights: nothing of PEFT is left."""
    folder = locate(str(where), FILES)
    if not is_adapter(folder):
        return load_model(folder, dtype, device)
    folded = fold(open_adapter(folder))  # in float32: bfloat16 would round twice
    return folded.to(device=device, dtype=dtype) if dtype else folded.to(device)


def open_adapter(folder: Path, dtype: torch.dtype | None = None) -> PeftModel:
    """An adapter on its base, as PEFT holds it; in float32 when `dtype` is None."""
    if read_json(folder / ADAPTER_CONFIG).get("task_type") == TASKS["reward"]:
        raise UserError(
            f"{folder}: holds an adapter of a reward model, not of a language model",
            "`llmctl score` reads it; give a language model here",
        )
    model = open_base(folder, torch.float32 if dtype is None else dtype)
    found = attach(model, folder)
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = read_generation_config(folder, carried(model.config))
    return found


def open_base(folder: Path, dtype: torch.dtype | None = None) -> LlmctlForCausalLM:
    """The model an adapter was trained on, without it."""
    return as_trained(open_folded(base_of(folder), dtype), folder)


def as_trained(model: M, folder: Path) -> M:
    """An adapter's base as the adapter saw it, in place: with its new rows, and rounded to NF4 if it was then.

    Raises UserError if the adapter needs rows that neither has.
    """
    made = run_of(folder) or {}
    if rows := made.get("vocab_size"):
        grow_vocabulary(model, rows)
    else:
        said, before = table_rows(folder), model.config.vocab_size
        rows = vocabulary_rows(said, before)
        settings, tied = read_json(folder / ADAPTER_CONFIG), model.config.tie_word_embeddings
        refuse_missing_rows(said, settings, before, rows, tied, folder)
        resize_vocabulary(model, rows)
    if made.get("base_precision") == "nf4":
        round_nf4(model)
    return model


def open_config(where: str | Path) -> LlmctlConfig:
    """The config of a model, or of the model an adapter belongs to, without the weights."""
    folder = locate(str(where), FILES)
    if not is_adapter(folder):
        return load_config(folder)
    config = open_config(base_of(folder))
    rows = (run_of(folder) or {}).get("vocab_size")
    if rows:
        config.vocab_size = max(config.vocab_size, rows)
    else:
        config.vocab_size = vocabulary_rows(table_rows(folder), config.vocab_size)
    return config


def open_generation_config(where: str | Path) -> StoredGenerationConfig:
    """The generation config of a model, or of an adapter, which has its base's if it brings none."""
    folder = locate(str(where), FILES)
    if is_adapter(folder) and not (folder / GENERATION_CONFIG).is_file():
        return open_generation_config(base_of(folder))
    return read_generation_config(folder, carried(open_config(folder)))


def stored_dtype(where: str | Path) -> torch.dtype:
    """The precision in which a model is stored, or the model an adapter belongs to."""
    folder = locate(str(where), FILES)
    if is_adapter(folder):
        return stored_dtype(base_of(folder))
    return dtype_named(read_json(folder / "config.json"), str(folder / "config.json")) or dtype_in(folder)


def base_of(folder: Path) -> str:
    """Where the base of an adapter lies now.

    Raises UserError if it is nowhere, or what lies there is not what the adapter was trained on.
    """
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    parents = (run_of(folder) or {}).get("parents") or []
    recorded = next((parent for parent in parents if parent["role"] == "model"), None)
    if recorded is None:
        if not named:
            raise UserError(f"{folder}: the adapter does not say which model it belongs to", _NAME_IT)
        return str(named)
    if not recorded["hash"]:
        return str(recorded["path"])  # a hub id
    here = [Path(path) for path in (recorded["path"], named) if path and Path(path).expanduser().is_dir()]
    for path in here:
        if path.resolve() != folder.resolve() and folder_hash(path) == recorded["hash"]:
            return str(path)
    moved = find_by_hash(recorded["hash"], Path(recorded["path"]))
    if moved is not None and moved.resolve() not in {path.resolve() for path in (folder, *here)}:
        return str(moved)
    if here:
        if content_hash(here[0]) == recorded["hash"]:
            refuse_damaged(here[0])  # the right one, and a file of it is not
        raise UserError(
            f"{folder}: {here[0]} is not the base this adapter was trained on, or has changed since",
            "put the base back, or train the adapter again on this one",
        )
    raise UserError(
        f"{folder}: its base {recorded['path']} is not there",
        "put it back; a run folder is found by its content anywhere under runs/",
    )


_NAME_IT = "set base_model_name_or_path in its adapter_config.json"
