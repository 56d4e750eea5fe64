"""Claim, on an NVIDIA GPU: the Triton FlashAttention kernels keep up with torch's own.

Forward, and forward and backward, in bfloat16 for several lengths and widths, causal and with a sliding window:

    triton    `flash_attention_triton`
    flash     torch's flash kernel with its causal flag; it knows no window, so there it computes full attention

Prints milliseconds, the part of the time that the other takes, and the largest difference. Without such a GPU it
says so and ends:

    python benchmarks/flash_attention.py --rounds 9
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import compare, line, options, report, speedups, summary
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmctl.kernels.flash import Band
from llmctl.kernels.flash_triton import PRESENT, can_run, flash_attention_triton

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = [(2048, 64), (8192, 64), (2048, 128), (8192, 128)]  # tokens, width of a head
BANDS = {"causal": Band(), "window 512": Band(window=512)}


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def pass_of(attention: Attention, qkv: list[Tensor], backward: bool) -> Callable[[], Tensor]:
    """One pass, waited for; returns the output."""
    upstream = torch.ones_like(attention(*qkv).detach())

    def work() -> Tensor:
        out = attention(*qkv)
        if backward:
            out.backward(upstream)
            for x in qkv:
                x.grad = None
        torch.cuda.synchronize()
        return out.detach()

    return work


def measure(
    given: argparse.Namespace, length: int, width: int, name: str, backward: bool
) -> dict[str, object]:
    torch.manual_seed(0)
    heads = (given.heads, given.groups, given.groups)
    shapes = [(given.rows, count, length, width) for count in heads]
    qkv = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=backward) for s in shapes]
    sides = {
        "triton": pass_of(lambda q, k, v: flash_attention_triton(q, k, v, BANDS[name])[0], qkv, backward),
        "flash": pass_of(torchs, qkv, backward),
    }
    seconds = compare(dict(sides), given.rounds)
    title = f"{name} {length}×{width}{' backward' if backward else ''}"
    found, ratios = {side: summary(s) for side, s in seconds.items()}, speedups(seconds, "triton")
    for side, one in found.items():
        print(line(f"{title}: {side}", one, 1e3, "ms"))
    print(line(f"{title}: flash/triton", ratios["flash/triton"]))
    result: dict[str, object] = {"seconds": found, "ratios": ratios}
    if BANDS[name].window is None:
        result["largest_difference"] = float((sides["triton"]() - sides["flash"]()).abs().max())
    return result


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--groups", type=int, default=4, help="key/value heads (default 4)")
    given = parser.parse_args()
    if not (PRESENT and torch.cuda.is_available() and can_run(torch.empty(0, device="cuda"))):
        print("this benchmark needs an NVIDIA GPU and Triton")
        return
    results = {
        f"{name} {length} {width} {'both' if backward else 'forward'}": measure(
            given, length, width, name, backward
        )
        for name in BANDS
        for length, width in SHAPES
        for backward in (False, True)
    }
    report({**vars(given), "gpu": torch.cuda.get_device_name(), **results})


if __name__ == "__main__":
    main()
