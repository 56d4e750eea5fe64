"""A model's two tables, embedding and head: more rows, as new tokens need, and one table for both or one each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmctl.model.hf import LlmctlPreTrainedModel


@torch.no_grad()
def grow_vocabulary(model: LlmctlPreTrainedModel, rows: int) -> None:
    """Give the embedding table and the head `rows` rows, in place; does nothing if they have as many.

    New rows are the mean of the old ones, which is neither likely nor unlikely as a token
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
    """
    before = model.config.vocab_size
    if rows <= before:
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [None if table is None else table.weight.float().mean(0) for table in tables]
    model.resize_token_embeddings(rows, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for table, mean in zip(tables, means, strict=True):
        if table is not None and mean is not None:
            table.weight[before:] = mean.to(table.weight)
    model.base_model.spec = model.config.spec


def resize_vocabulary(model: LlmctlPreTrainedModel, rows: int) -> None:
    """Give the tables `rows` rows, in place: new ones as `grow_vocabulary` makes them, or without the last ones."""
    if rows >= model.config.vocab_size:
        return grow_vocabulary(model, rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.base_model.spec = model.config.spec


def untie(model: LlmctlPreTrainedModel) -> None:
    """Give a head that shares the embedding's table a copy of its own, in place; passes may be on both."""
    head = model.get_output_embeddings()
    if head is None:  # a model that scores
        return
    head = _inner(head)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    _set_tied(model, False)


def tie(model: LlmctlPreTrainedModel) -> None:
    """Let the head share the embedding's table, in place."""
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    _set_tied(model, True)


def _inner(module: Any) -> Any:
    """The layer inside of what a pass has put around it."""
    named = module.named_modules()
    return next((each for name, each in named if name.rpartition(".")[2] == "base_layer"), module)


def _set_tied(model: LlmctlPreTrainedModel, tied: bool) -> None:
    model.config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    model.base_model.spec = model.config.spec
