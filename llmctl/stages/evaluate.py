"""`llmctl eval`: how well a model predicts the text in some files."""

from __future__ import annotations

from typing import Any

from llmctl.data.packing import cut, pack
from llmctl.data.shards import open_shards
from llmctl.errors import UserError
from llmctl.kernels.device import pick_compute
from llmctl.model.open import open_config, open_model
from llmctl.recipe.schema import EvalRecipe
from llmctl.stages.text import (
    TextRows,
    encoder_of,
    refuse_mismatch,
    refuse_swapped_tokenizer,
    row_length,
    score_rows,
    tell,
)
from llmctl.talk import Talk
from llmctl.tokenizer.load import load_tokenizer


def run(recipe: EvalRecipe, talk: Talk) -> dict[str, Any]:
    """loss (nats per token), perplexity, bits_per_byte, tokens and bytes.

    Documents longer than a row are split; every token but a document's first is predicted once.

    Raises UserError: no data, data that cannot be read, a model or tokenizer that cannot be loaded
    or do not fit each other.
    """
    settings = recipe.eval
    if not settings.data:
        raise UserError("no data to score", "name files with --data FILE")
    assert recipe.base is not None
    compute = pick_compute(recipe.device, settings.dtype, "eval.dtype")
    open_config(recipe.base)  # a broken config.json would look like a broken tokenizer
    tokenizer = load_tokenizer(recipe.base)
    model = open_model(recipe.base, compute.dtype, compute.device)
    refuse_mismatch(tokenizer, model.config.vocab_size, recipe.base)
    refuse_swapped_tokenizer(tokenizer, recipe.base)
    length = row_length(settings.max_length, model.config.max_position_embeddings, "eval.max_length")
    shards = open_shards(settings.data, settings.text_field, encoder_of(tokenizer), settings.cache_dir, talk)
    pieces = cut(shards.doc_start, length, "split", shards.where)
    tell(shards, pieces, length, talk)
    text = TextRows(shards, pieces, pack(pieces.length, length), length)
    return score_rows(model, text, tokenizer, compute, settings.batch_size, settings.max_rows).figures()
