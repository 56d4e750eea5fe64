"""`--dry-run`: what a run would do, without doing it."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmctl.data.document import Account
from llmctl.data.packing import cut, pack, unpacked
from llmctl.data.readers import documents
from llmctl.data.sources import total_bytes
from llmctl.kernels.device import Compute
from llmctl.plan.memory import checkpoint_bytes, training_bytes
from llmctl.plan.size import flops_per_token, total_parameters
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe
from llmctl.talk import Talk
from llmctl.tokenizer.load import encode_batch
from llmctl.train.loop import total_steps

FIRST = 2_000  # documents that are really read and tokenized


def plan_pretraining(
    recipe: PretrainRecipe,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSection,
    compute: Compute,
    max_length: int,
    talk: Talk,
) -> dict[str, Any]:
    """Rows, tokens, steps, parameters and memory of a pretraining run.

    Reads the first documents for real, so bad data shows here; when there are more, rows and tokens
    are scaled up by input bytes and `estimated` is true.
    """
    data, train = recipe.data, recipe.train
    account = Account()
    whole = total_bytes(data.train)
    found = documents(data.train, data.text_field, account)
    texts = [document.text for document in islice(found, FIRST)]
    more = next(found, None) is not None
    extra = sum(token is not None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    lengths = np.array([len(ids) + extra for ids in encode_batch(tokenizer, texts)], dtype=np.int64)
    pieces = cut(np.concatenate([[0], np.cumsum(lengths)]), max_length, data.overlong)
    rows = pack(pieces.length, max_length) if data.packing else unpacked(len(pieces))
    scale = 1.0
    if more and whole:
        scale = max(1.0, whole / account.input_bytes)
    elif more:
        talk.say(f"the data does not say how long it is; the plan counts its first {FIRST:,} documents")
    total_rows = math.ceil(len(rows) * scale)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    steps = total_steps(train, -(-total_rows // per_step))
    memory = training_bytes(
        spec,
        train.per_device_train_batch_size,
        max_length,
        compute.dtype.itemsize,
        train.gradient_checkpointing,
    )
    return {
        "device": str(compute),
        "parameters": total_parameters(spec),
        "documents": account.read if not more else f"more than {FIRST:,}",
        "tokens": round(pieces.trained_tokens * scale),
        "rows": total_rows,
        "estimated": more,
        "steps": steps,
        "tokens_in_run": steps * per_step * max_length,
        "training_flops": 3 * flops_per_token(spec, max_length) * steps * per_step * max_length,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "disk_bytes": checkpoint_bytes(spec) * (train.save_total_limit + 1),
    }
