"""Claim, on a CPU: attention within buckets takes time that grows with an exponent of at most 1.3.

Forward and backward in float32 of one row of 1024, 2048, … 16384 tokens, with √T buckets and a chunk that stays as it
is. The exponent is the slope of the median times over the lengths, both logarithmic. It is 2 for full attention.

    routing    one round of buckets: the nearest of √T random centroids
    lsh        several rounds: the buckets of angular LSH, q = k, a token sees others before itself
    full       torch's kernel with its causal flag, for comparison

The sorting is part of the time; the choice of buckets, which is the mixer's, is not. Prints milliseconds and slopes:

    OMP_NUM_THREADS=1 python benchmarks/bucket_attention.py --threads 1
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import compare, line, options, report, summary
from torch import Tensor

from llmctl.kernels.buckets import Buckets, attend_buckets

ASKED = 1.3
LENGTHS = (1024, 2048, 4096, 8192, 16384)
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def operands(given: argparse.Namespace, length: int) -> list[Tensor]:
    """q, k, v [1, H, T, D]."""
    torch.manual_seed(0)
    return [torch.randn(1, given.heads, length, given.width, requires_grad=True) for _ in range(3)]


def routed(x_BHTD: Tensor) -> Tensor:
    """[B, H, T]: the nearest of √T random centroids."""
    count, width = round(math.sqrt(x_BHTD.shape[2])), x_BHTD.shape[3]
    return (F.normalize(x_BHTD, dim=-1) @ F.normalize(torch.randn(width, count), dim=0)).argmax(-1)


def hashed(x_BHTD: Tensor, rounds: int) -> Tensor:
    """[B, H, R, T]: in each round, which of √T directions, pairwise opposite, is the nearest."""
    half = max(1, round(math.sqrt(x_BHTD.shape[2]) / 2))
    turned = torch.einsum("bhtd,rdn->bhrtn", x_BHTD, torch.randn(rounds, x_BHTD.shape[3], half))
    return torch.cat([turned, -turned], -1).argmax(-1)


def pass_of(attention: Side, qkv: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    upstream = torch.ones_like(attention(*qkv).detach())

    def work() -> None:
        attention(*qkv).backward(upstream)
        for x in qkv:
            x.grad = None

    return work


def sides(given: argparse.Namespace, length: int) -> dict[str, Callable[[], object]]:
    qkv = operands(given, length)
    clusters, hashes = routed(qkv[0].detach()), hashed(qkv[0].detach(), given.hashes)

    # a new object each time: the order of the tokens is kept in it
    def routing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_buckets(q, k, v, Buckets(clusters, None, given.chunk, causal=True))

    def lsh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_buckets(q, q, v, Buckets(hashes, None, given.chunk, causal=True, others_first=True))

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {
        f"{name} {length}": pass_of(side, qkv)
        for name, side in (("routing", routing), ("lsh", lsh), ("full", full))
    }


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Least squares of log seconds over log lengths."""
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = torch.tensor(seconds, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head (default 64)")
    parser.add_argument("--chunk", type=int, default=128, help="members of a chunk (default 128)")
    parser.add_argument("--hashes", type=int, default=2, help="rounds of lsh (default 2)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    works = {name: work for length in LENGTHS for name, work in sides(given, length).items()}
    found = {name: summary(s) for name, s in compare(works, given.rounds).items()}
    for name, one in found.items():
        print(line(name, one, 1e3, "ms"))
    slopes = {}
    for kind in ("routing", "lsh", "full"):
        slopes[kind] = slope(list(LENGTHS), [found[f"{kind} {length}"]["median"] for length in LENGTHS])
        print(f"{kind}: time grows as T^{slopes[kind]:.2f}")
    held = all(slopes[kind] <= ASKED for kind in ("routing", "lsh"))
    print(f"an exponent of at most {ASKED:g} for routing and lsh: {'yes' if held else 'NO'}")
    report({**vars(given), "seconds": found, "slopes": slopes, "held": held})


if __name__ == "__main__":
    main()
