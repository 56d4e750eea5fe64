"""Claim, on a CPU: local patterns are at least three times as fast by blocks as under a dense mask.

Forward and backward in float32 of one row of 8192 tokens, for sliding windows of 256 and 512 and for local blocks
of 256:

    blocks     `attend_blocks`: each block of queries reads the blocks of keys it sees
    dense      torch's kernel under a boolean mask [1, 1, T, T]
    causal     torch's kernel with its causal flag, which computes full attention: what no pattern at all costs

Layouts and masks are made beforehand, since layers share them; their own time is printed too. Prints milliseconds
and how many times as long the others take as `blocks`:

    OMP_NUM_THREADS=1 python benchmarks/local_attention.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import compare, line, options, ratio, report, seconds_per_call, speedups, summary
from torch import Tensor

from llmctl.kernels.attention import Visibility, attend
from llmctl.kernels.blocks import BlockLayout, attend_blocks, block_layout

ASKED = 3.0
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def within(window: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: query - key < window


def same_block(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: query // size == key // size


# name -> predicate, reach
PATTERNS = {
    "window 256": (within(256), 255),
    "window 512": (within(512), 511),
    "block 256": (same_block(256), 255),
}


def operands(given: argparse.Namespace) -> list[Tensor]:
    """q [1, H, T, D], k and v [1, G, T, D]."""
    torch.manual_seed(0)
    heads = (given.heads, given.groups, given.groups)
    return [torch.randn(1, count, given.length, given.width, requires_grad=True) for count in heads]


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


def layout_of(name: str, given: argparse.Namespace) -> BlockLayout:
    sees, reach = PATTERNS[name]
    return block_layout(torch.arange(given.length)[None], None, sees, reach, given.block, causal=True)


def measure(name: str, given: argparse.Namespace) -> dict[str, object]:
    qkv, layout = operands(given), layout_of(name, given)
    dense = Visibility("dense", mask=layout.dense(given.length)[:, None])
    sides = {
        "blocks": pass_of(lambda q, k, v: attend_blocks(q, k, v, layout), qkv),
        "dense": pass_of(lambda q, k, v: attend(q, k, v, dense), qkv),
        "causal": pass_of(lambda q, k, v: attend(q, k, v, Visibility("causal")), qkv),
    }
    apart = float((sides["blocks"]() - sides["dense"]()).abs().max())
    seconds = compare(sides, given.rounds)
    found, ratios = {side: summary(s) for side, s in seconds.items()}, speedups(seconds, "blocks")
    for side, one in found.items():
        print(line(f"{name}: {side}", one, 1e3, "ms"))
    making = seconds_per_call(lambda: layout_of(name, given))
    print(f"{name}: making the layout {making * 1e3:.1f} ms, key blocks read {layout.key_blocks.shape[1]}")
    for side, one in ratios.items():
        print(line(f"{name}: {side}", one))
    held = ratio(seconds["dense"], seconds["blocks"])["median"] >= ASKED
    print(f"{name}: at least {ASKED:g} times as fast as dense: {'yes' if held else 'NO'}")
    return {
        "seconds": found,
        "ratios": ratios,
        "layout_seconds": making,
        "largest_difference": apart,
        "held": held,
    }


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4, help="key/value heads (default 4)")
    parser.add_argument("--length", type=int, default=8192, help="tokens in a row (default 8192)")
    parser.add_argument("--width", type=int, default=64, help="of a head (default 64)")
    parser.add_argument("--block", type=int, default=128, help="tokens of a block (default 128)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report({**vars(given), **{name: measure(name, given) for name in PATTERNS}})


if __name__ == "__main__":
    main()
