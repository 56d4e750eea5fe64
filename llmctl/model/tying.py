"""Checkpoints whose config says that the head is tied, and whose files hold a head of their own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from llmctl.errors import UserError
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import FAMILIES
from llmctl.model.families.row import Family
from llmctl.model.keymap import to_disk
from llmctl.model.notes import say_once
from llmctl.model.weights import INDEX, WEIGHTS, Stored, open_weights

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 8192  # compared at a time


def tied_as_stored(config: LlmctlConfig, tensors: Mapping[str, Stored], folder: Path) -> LlmctlConfig:
    """The config with `tie_word_embeddings` as the files have it; says so once where that is not as it was.

    transformers keeps a head that differs from the embedding table, whatever the config says
    (`PreTrainedModel.tie_weights`), and so does vLLM.
    """
    if not config.tie_word_embeddings:
        return config
    family, (head, table) = family_of(config), names_on_disk(config)
    found = family.current_names(tensors, {head, table})
    if head not in found or table not in found or _equal(found[head].mapped(), found[table].mapped()):
        return config
    say_once(
        f"{folder / 'config.json'}: tie_word_embeddings is true, but the weights hold a head of their own "
        f"({found[head].name}), which is kept"
    )
    config.tie_word_embeddings = False
    return config


def table_from_head(config: LlmctlConfig, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors by name, where one that is both head and table is stored as the head alone.

    `safetensors.torch.save_model` keeps the name that comes first in the alphabet.
    """
    head, table = names_on_disk(config)
    if not config.tie_word_embeddings or table in tensors or head not in tensors:
        return dict(tensors)
    return {table if name == head else name: stored for name, stored in tensors.items()}


def refuse_missing_head(config: LlmctlConfig, missing: list[str], folder: Path) -> None:
    """Raise UserError if all that is missing is a head, which the config says is not the embedding table."""
    if missing == [names_on_disk(config)[0]] and not config.tie_word_embeddings:
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is false, but the weights hold no head ({missing[0]})",
            "set it to true if the head is the embedding table",
        )


def family_of(config: LlmctlConfig) -> Family:
    """The family a model is stored as."""
    return FAMILIES.get(config.spec.family, Family("Llmctl"))


def names_on_disk(config: LlmctlConfig) -> tuple[str, str]:
    """What the files call the head and the embedding table."""
    like, rules = torch.empty(1, 1, device="meta"), family_of(config).rules(config.spec)
    head, table = (next(iter(to_disk({name: like}, rules))) for name in (HEAD, TABLE))
    return head, table


def tied_in(folder: Path, config: LlmctlConfig) -> LlmctlConfig:
    """As `tied_as_stored`, where only the config is wanted; as it is where there are no safetensors."""
    if not config.tie_word_embeddings or not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return config
    with ExitStack() as stack:
        return tied_as_stored(config, open_weights(folder, stack, allow_pickle=False), folder)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return all(
        torch.equal(one.float(), other.float())
        for one, other in zip(a.split(ROWS), b.split(ROWS), strict=True)
    )
