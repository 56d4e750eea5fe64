"""Claims, on a CPU: attention is faster in float32 than in bfloat16, and by document than under a dense mask.

The first is why attention leaves bf16 autocast there: three ways, forward and backward, for one document a row:

    float32    torch's kernel on float32 operands
    bfloat16   the same kernel on bfloat16 operands
    cast       bfloat16 operands turned into float32 first: what llmctl does

The second is why packed rows are cut into documents: the same rows, forward and backward, in float32:

    spans      a kernel call for each document
    dense      one call with a boolean mask [B, 1, T, T] (made beforehand: layers share it)

Prints milliseconds and ratios. Shapes are those of `recipes/pretrain-5m.yaml` unless options say otherwise:

    python benchmarks/attention_cpu.py --rounds 9
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from timing import compare, line, options, report, speedups, summary
from torch import Tensor

from llmctl.data.batches import Batches, Laid
from llmctl.data.packing import cut, pack
from llmctl.kernels.attention import PATHS, Visibility, attend
from llmctl.model.context import packed_context
from llmctl.model.patterns import Full

CAUSAL = Visibility("causal")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def operands(given: argparse.Namespace, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [B, H, T, D]: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    shape = (given.rows, given.heads, given.length, given.width)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def pass_of(attention: Attention, qkv: list[Tensor]) -> Callable[[], Tensor]:
    """Forward and backward; returns the output."""
    upstream = torch.ones_like(attention(*qkv).detach())

    def work() -> Tensor:
        out = attention(*qkv)
        out.backward(upstream)
        for x in qkv:
            x.grad = None
        return out.detach()

    return work


def positions(given: argparse.Namespace) -> Tensor:
    """position_ids [B, T] of packed rows: documents of log-normal lengths around 350 tokens, cut at T."""
    lengths = np.random.default_rng(0).lognormal(5.8, 1.0, 40 * given.rows).clip(8, 8000).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    pieces = cut(starts, given.length, "split")
    data = Batches(
        Laid(np.zeros(starts[-1], dtype=np.uint16), pieces, pack(pieces.length, given.length)),
        max_length=given.length,
        batch_size=given.rows,
        accumulation=1,
        seed=0,
        pad_id=0,
    )
    # full rows only: the last places of the others would be padding, cut off by the collation
    return next(
        found for step in range(data.steps_per_epoch)
        if (found := data.step(step)[0]["position_ids"]).shape == (given.rows, given.length)
    )  # fmt: skip


def precisions(given: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    single, half = operands(given, torch.float32), operands(given, torch.bfloat16)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return PATHS["causal"](q, k, v, CAUSAL)

    def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, CAUSAL)

    return {
        "float32": pass_of(kernel, single),
        "bfloat16": pass_of(kernel, half),
        "cast": pass_of(cast, half),
    }


def packings(given: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    ctx = packed_context(positions(given))
    spans, dense = ctx.visible(Full()), Visibility("dense", mask=ctx.mask(Full())[:, None])
    assert spans.path == "spans" and spans.spans is not None
    print(f"packed rows: {len(spans.spans)} documents in {given.rows} rows of {given.length}")
    qkv = operands(given, torch.float32)
    return {
        "spans": pass_of(lambda q, k, v: attend(q, k, v, spans), qkv),
        "dense": pass_of(lambda q, k, v: attend(q, k, v, dense), qkv),
    }


def measure(title: str, sides: dict[str, Callable[[], Tensor]], ours: str, rounds: int) -> dict[str, object]:
    """Time the sides, and say how far their outputs are apart."""
    outputs = [side().float() for side in sides.values()]
    apart = max(float((out - outputs[0]).abs().max()) for out in outputs)
    seconds = compare(sides, rounds)
    found, ratios = {name: summary(s) for name, s in seconds.items()}, speedups(seconds, ours)
    for name, one in found.items():
        print(line(f"{title}: {name}", one, 1e3, "ms"))
    for name, one in ratios.items():
        print(line(f"{title}: {name}", one))
    return {"seconds": found, "ratios": ratios, "largest_difference": apart}


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row (default 256)")
    parser.add_argument("--width", type=int, default=64, help="of a head (default 64)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report(
        {
            **vars(given),
            "precision": measure("precision", precisions(given), "float32", given.rounds),
            "packing": measure("packing", packings(given), "spans", given.rounds),
        }
    )


if __name__ == "__main__":
    main()
