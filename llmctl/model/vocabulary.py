"""More rows for a model's vocabulary, as new special tokens need."""

from __future__ import annotations

import torch

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
