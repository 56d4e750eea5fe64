"""`--dry-run`: what a run would do, without doing it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import split_holdout
from llmctl.data.document import Account, Document
from llmctl.data.packing import cut, pack, unpacked
from llmctl.data.readers import documents
from llmctl.data.sources import total_bytes
from llmctl.kernels.cross_entropy import slice_tokens
from llmctl.kernels.device import Compute
from llmctl.plan.disk import refuse_small_disk, training_disk
from llmctl.plan.memory import training_bytes
from llmctl.plan.size import flops_per_token, total_parameters
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe
from llmctl.stages.costs import Work, plan, tokenizer_bytes
from llmctl.tokenizer.load import encode_batch
from llmctl.train.loop import every, total_steps

FIRST = 4_000_000  # characters that are really read and tokenized


def plan_pretraining(
    recipe: PretrainRecipe,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSection,
    compute: Compute,
    max_length: int,
    out: Path,
) -> dict[str, Any]:
    """Rows, tokens, steps, parameters, time, memory and disk of a pretraining run.

    Reads the first documents for real, so bad data shows here; when there are more, rows and tokens
    are scaled up by input bytes and `estimated` is true.

    Raises UserError as the readers do, or if the disk of `out` is too small.
    """
    data, train = recipe.data, recipe.train
    counted = count_tokens(data.train, data.text_field, tokenizer)
    lengths, scale = counted.lengths, counted.scale
    if data.eval:
        next(documents(data.eval, data.text_field, Account()), None)  # bad files should show here too
    pieces = cut(np.concatenate([[0], np.cumsum(lengths)]), max_length, data.overlong)
    if not data.eval:
        pieces, _ = split_holdout(pieces, data.eval_fraction, train.seed)
    rows = pack(pieces.length, max_length) if data.packing else unpacked(len(pieces))
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
    tokens = steps * per_step * max_length
    flops = 3 * flops_per_token(spec, max_length) * tokens
    disk = pretraining_disk(recipe, spec, steps)
    refuse_small_disk(out, disk)
    facts = {
        "device": str(compute),
        "parameters": total_parameters(spec),
        **counted.facts(),
        "tokens": round(pieces.trained_tokens * scale),
        "rows": total_rows,
        "steps": steps,
        "tokens_in_run": tokens,
        "training_flops": flops,
    }
    seconds = Work(compute, trained=tokens, length=max_length).seconds(spec)
    return plan(facts, seconds, memory, disk, out, compute.device)


@dataclass(frozen=True)
class Counted:
    """Tokens of some data, counted in its first documents.

    Args:
        lengths: tokens of each document that was read, int64 [D].
        scale: by how much the whole is larger than what was read.
        more: whether there is more than was read.
    """

    lengths: np.ndarray
    scale: float
    more: bool

    @property
    def tokens(self) -> int:
        """Of the whole."""
        return round(int(self.lengths.sum()) * self.scale)

    def facts(self) -> dict[str, Any]:
        """What a plan says of it."""
        read = len(self.lengths)
        return {"documents": f"more than {read:,}" if self.more else read, "estimated": self.more}


def count_tokens(sources: list[str], text_field: str, tokenizer: PreTrainedTokenizerFast) -> Counted:
    """Read and tokenize the first documents, and estimate the rest by bytes. Raises UserError as the readers do."""
    account = Account()
    whole = total_bytes(sources)
    # a builtin does not know its size beforehand, and is small enough to count
    texts, more = _first(documents(sources, text_field, account), FIRST if whole is not None else None)
    extra = sum(token is not None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    lengths = np.array([len(ids) + extra for ids in encode_batch(tokenizer, texts)], dtype=np.int64)
    return Counted(lengths, max(1.0, whole / account.input_bytes) if more and whole else 1.0, more)


def pretraining_disk(recipe: PretrainRecipe, spec: ModelSection, steps: int) -> dict[str, int]:
    """The most bytes on the disk at once; see `training_disk`."""
    train = recipe.train
    return training_disk(
        total_parameters(spec),
        tokenizer_bytes(Path(recipe.tokenizer or recipe.base or "").expanduser()),
        steps=steps,
        save_steps=every(steps, train.save_steps),
        keep=train.save_total_limit,
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
