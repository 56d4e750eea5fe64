"""`--dry-run`: what a run would do, without doing it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import split_holdout
from llmctl.data.document import Account, Document, Limit
from llmctl.data.packing import cut, pack, unpacked
from llmctl.data.readers import documents
from llmctl.data.sources import total_bytes
from llmctl.errors import UserError
from llmctl.kernels.cross_entropy import slice_tokens
from llmctl.kernels.device import Compute
from llmctl.plan.memory import checkpoint_bytes, training_bytes
from llmctl.plan.size import flops_per_token, total_parameters
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe
from llmctl.tokenizer.load import encode_batch
from llmctl.train.loop import total_steps

FIRST = 4_000_000  # characters that are really read and tokenized


def plan_pretraining(
    recipe: PretrainRecipe,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSection,
    compute: Compute,
    max_length: int,
) -> dict[str, Any]:
    """Rows, tokens, steps, parameters and memory of a pretraining run.

    Reads the first documents for real, so bad data shows here; when there are more, rows and tokens
    are scaled up by input bytes and `estimated` is true.
    """
    data, train = recipe.data, recipe.train
    account = Account()
    whole = total_bytes(data.train)
    limit = Limit(data.max_document_mb)
    found = documents(data.train, data.text_field, account, limit)
    # a builtin does not know its size beforehand, and is small enough to count
    texts, more = _first(found, FIRST if whole is not None else None)
    extra = sum(token is not None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    lengths = np.array([len(ids) + extra for ids in encode_batch(tokenizer, texts)], dtype=np.int64)
    if data.eval:
        next(documents(data.eval, data.text_field, Account(), limit), None)  # bad files should show here too
    pieces = cut(np.concatenate([[0], np.cumsum(lengths)]), max_length, data.overlong)
    if not data.eval:
        pieces, _ = split_holdout(pieces, data.eval_fraction, train.seed)
    rows = pack(pieces.length, max_length) if data.packing else unpacked(len(pieces))
    scale = max(1.0, whole / account.input_bytes) if more and whole else 1.0
    total_rows = math.ceil(len(rows) * scale)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    steps = total_steps(train, -(-total_rows // per_step))
    memory = training_bytes(
        spec,
        train.per_device_train_batch_size,
        max_length,
        compute.dtype.itemsize,
        train.gradient_checkpointing,
        slice_tokens(compute.device.type),
    )
    return {
        "device": str(compute),
        "parameters": total_parameters(spec),
        "documents": account.read if not more else f"more than {account.read:,}",
        "tokens": round(pieces.trained_tokens * scale),
        "rows": total_rows,
        "estimated": more,
        "steps": steps,
        "tokens_in_run": steps * per_step * max_length,
        "training_flops": 3 * flops_per_token(spec, max_length) * steps * per_step * max_length,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "disk_bytes": checkpoint_bytes(spec) * (train.save_total_limit + 1),
    }


def refuse_too_large(spec: ModelSection) -> None:
    """Raise UserError for a model whose weights alone are more than this machine's memory."""
    count, memory = total_parameters(spec), psutil.virtual_memory().total
    if 4 * count > memory:
        raise UserError(
            f"the model has {count:,} parameters, which take {4 * count / 1e9:,.0f} GB, "
            f"and this machine has {memory / 1e9:,.0f} GB of memory",
            "make model.hidden_size, model.num_hidden_layers or another width smaller",
        )


def _first(found: Iterator[Document], characters: int | None) -> tuple[list[str], bool]:
    """Texts until there are so many characters, and whether there are more."""
    texts: list[str] = []
    count = 0
    for document in found:
        texts.append(document.text)
        count += len(document.text)
        if characters is not None and count >= characters:
            return texts, next(found, None) is not None
    return texts, False
