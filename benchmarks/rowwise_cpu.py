"""Claim: on a CPU, the per-token operations with hand-written gradients are faster than autograd's.

Forward and backward of

    rms_norm   ours, torch's F.rms_norm, and the definition written in plain operations
    rotate     ours and the definition, in float32 and, as under autocast, from bfloat16

at the sizes of `recipes/pretrain-5m.yaml` (2048 tokens of width 256, 4 heads of 64) unless options say
otherwise. Prints microseconds and how many times as long the others take as ours:

    python benchmarks/rowwise_cpu.py --rounds 15
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import compare, line, options, report, speedups, summary
from torch import Tensor

from llmctl.kernels.rowwise import rms_norm, rms_norm_reference, rotate, rotate_reference

EPS = 1e-5


def pass_of(function: Callable[..., Tensor], leaves: list[Tensor], *rest: object) -> Callable[[], object]:
    """Forward and backward with respect to `leaves`."""
    upstream = torch.ones_like(function(*leaves, *rest).detach())

    def work() -> None:
        function(*leaves, *rest).backward(upstream)
        for x in leaves:
            x.grad = None

    return work


def norms(tokens: int, width: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(tokens, width, requires_grad=True)
    weight = torch.ones(width, requires_grad=True)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, EPS)

    return {
        "ours": pass_of(rms_norm, [x, weight], EPS),
        "torch": pass_of(torchs, [x, weight]),
        "definition": pass_of(rms_norm_reference, [x, weight], EPS),
    }


def rotations(tokens: int, heads: int, width: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x = torch.randn(1, heads, tokens, width).to(dtype).requires_grad_()
    angles = torch.randn(1, 1, tokens, width // 2)
    tables = angles.cos(), angles.sin()
    return {"ours": pass_of(rotate, [x], *tables), "definition": pass_of(rotate_reference, [x], *tables)}


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256, help="of a token (default 256)")
    parser.add_argument("--heads", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    head = given.width // given.heads
    operations = {
        "rms_norm": norms(given.tokens, given.width),
        "rotate float32": rotations(given.tokens, given.heads, head, torch.float32),
        "rotate bfloat16": rotations(given.tokens, given.heads, head, torch.bfloat16),
    }
    result: dict[str, object] = {}
    for operation, sides in operations.items():
        seconds = compare(sides, given.rounds)
        found, ratios = {name: summary(s) for name, s in seconds.items()}, speedups(seconds, "ours")
        for name, one in found.items():
            print(line(f"{operation}: {name}", one, 1e6, "µs"))
        for name, one in ratios.items():
            print(line(f"{operation}: {name}", one))
        result[operation] = {"seconds": found, "ratios": ratios}
    report({**vars(given), **result})


if __name__ == "__main__":
    main()
