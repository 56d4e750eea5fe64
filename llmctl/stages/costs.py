"""What a run will cost, in one form for every `--dry-run`: time, memory and disk beside what there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from llmctl.kernels.device import Compute
from llmctl.kernels.rate import product_rate
from llmctl.plan.disk import SMALL_FILES, free_bytes
from llmctl.plan.memory import LIBRARIES, WEIGHT
from llmctl.plan.size import flops_per_token, kv_cache_bytes, total_parameters
from llmctl.recipe.model import ModelSection
from llmctl.recipe.tune import CompareRows
from llmctl.stages.rows import TalkRows
from llmctl.tokenizer.load import FILES

# Share of the rate of bare products that a pass through a whole model reaches (docs/performance.md): 0.36 in
# training a model of 1 M parameters in bfloat16
EFFICIENCY = 0.4
ROWS = 512  # vectors in the products that are measured
OPENING = 2e8  # bytes a second at which weights are read, converted and written


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Args:
        compute: where, and in which precision.
        trained: tokens that go forward and back.
        read: tokens that only go forward.
        decoded: tokens that are written one by one.
        length: tokens of a row.
        moved: bytes of weights that are read or written.
        flops: of bare products beside the model's passes.
    """

    compute: Compute
    trained: float = 0
    read: float = 0
    decoded: float = 0
    length: int = 512
    moved: float = 0
    flops: float = 0

    def seconds(self, spec: ModelSection) -> float:
        """About how long it takes, from the rate of products measured here and now."""
        width, inner = spec.hidden_size, spec.intermediate_size or spec.hidden_size
        device, dtype = self.compute.device, self.compute.dtype
        forward = flops_per_token(spec, min(self.length, spec.max_position_embeddings))
        rate = product_rate(device, dtype, ROWS, width, inner)
        passes = (3 * self.trained + self.read) * forward / EFFICIENCY
        found = (passes + self.flops) / rate + self.moved / OPENING
        if self.decoded:
            found += self.decoded * forward / (EFFICIENCY * product_rate(device, dtype, 1, width, inner))
        return found


def reading_bytes(
    spec: ModelSection, copies: int, width: int, tokens: int, head_tokens: int
) -> dict[str, int]:
    """Peak bytes by part when models are only read: `copies` of the weights, `width` bytes each.

    Args:
        tokens: in a batch.
        head_tokens: whose logits exist at once, per copy.
    """
    inner = spec.intermediate_size or spec.hidden_size
    return {
        "weights": copies * width * total_parameters(spec),
        "activations": tokens * (4 * spec.hidden_size + 2 * inner) * WEIGHT
        + kv_cache_bytes(spec, min(tokens, spec.max_position_embeddings), WEIGHT),
        "logits": copies * head_tokens * (spec.vocab_size or 0) * WEIGHT,
        "libraries": LIBRARIES,
    }


def model_disk(spec: ModelSection, bits: float, folder: Path) -> dict[str, int]:
    """Bytes of a model that is written whole, with the tokenizer of `folder`."""
    return {"result": round(total_parameters(spec) * bits / 8) + tokenizer_bytes(folder) + SMALL_FILES}


def tokenizer_bytes(folder: Path) -> int:
    """Bytes of a tokenizer's files in a folder; 0 where it is not a folder here."""
    if not folder.is_dir():
        return 0
    return sum(file.stat().st_size for pattern in FILES for file in folder.glob(pattern) if file.is_file())


def plan(
    facts: Mapping[str, Any],
    seconds: float,
    memory: Mapping[str, int],
    disk: Mapping[str, int],
    out: Path | None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The plan that a dry run prints.

    Args:
        facts: of the stage: rows, tokens, steps.
        disk: bytes by part; empty for a stage that writes nothing.
        out: where they will be written.
        device: whose memory it is; None is that of the host.
    """
    told = {**facts, "seconds": round(seconds, 1)}
    if memory:
        told["memory_bytes"] = {**memory, "total": sum(memory.values())}
        told["memory_available_bytes"] = _available(device)
    if disk and out is not None:
        told["out"] = str(out)
        told["disk_bytes"] = {**disk, "total": sum(disk.values())}
        told["disk_free_bytes"] = free_bytes(out)
    return told


def _available(device: torch.device | None) -> int:
    """Bytes of memory that nobody uses now."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def compared_tokens(rows: TalkRows, settings: CompareRows) -> int:
    """Tokens of the rows that two models are held against each other on."""
    laid, shown = rows.laid, min(settings.max_rows, len(rows.laid.rows))
    mean = int(laid.pieces.length.sum()) / max(1, len(laid.rows))
    return min(settings.max_tokens, round(shown * mean))


def comparison(
    rows: TalkRows, settings: CompareRows, compute: Compute, passes: int, moved: float, flops: float = 0
) -> Work:
    """What it takes to hold models against each other: `passes` over the rows, and the answers of two models."""
    read, decoded = passes * compared_tokens(rows, settings), 2 * settings.answers * settings.max_new_tokens
    return Work(compute, read=read, decoded=decoded, length=rows.max_length, moved=moved, flops=flops)


def comparison_memory(
    spec: ModelSection, rows: TalkRows, settings: CompareRows, copies: int, width: int
) -> dict[str, int]:
    """Peak bytes by part while `copies` of a model are in memory."""
    batch = min(settings.batch_size, len(rows.laid.rows)) * rows.max_length
    return reading_bytes(spec, copies, width, batch, min(batch, compared_tokens(rows, settings)))
