"""The Triton FlashAttention kernels: against plain torch, and beside torch's own flash kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.measure import furthest, milliseconds, seconds_in_turn, within
from gpu_parts.report import Report, Row
from llmctl.kernels.flash import Band, flash_attention
from llmctl.kernels.flash_triton import can_run, flash_attention_triton

# name -> band, (heads, groups, queries, keys, width, width of values)
SMALL = {
    "causal": (Band(), (4, 2, 300, 300, 64, 64)),
    "open": (Band(causal=False), (4, 2, 300, 300, 64, 64)),
    "sliding": (Band(window=70), (4, 2, 500, 500, 64, 64)),
    "both ways": (Band(causal=False, window=65), (4, 2, 500, 500, 64, 64)),
    "fewer queries": (Band(), (4, 2, 9, 300, 64, 64)),
    "narrow, uneven widths": (Band(), (4, 2, 200, 200, 24, 12)),
    "width 128": (Band(), (4, 2, 300, 300, 128, 128)),
    "width 256": (Band(), (2, 2, 200, 200, 256, 256)),
    "width 512": (Band(), (2, 2, 200, 200, 512, 512)),
}
FIRST = ("causal", "sliding")
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ROWS, HEADS, GROUPS = 4, 16, 4
SHAPES = [(2048, 64), (8192, 64), (2048, 128), (8192, 128)]  # tokens, width of a head
BANDS = {"causal": Band(), "window 512": Band(window=512)}


def run(report: Report) -> None:
    if not can_run(torch.empty(0, device=report.device)):
        report.row("Triton kernels", status="skipped", note="they need Triton and an NVIDIA GPU")
        return
    _check(report, torch.bfloat16, FIRST)
    for backward in (False, True):
        for length, width in SHAPES[: report.size(None, 1)]:
            for name in BANDS:
                way = "forward and backward" if backward else "forward"
                title = f"flash, {name}, {length} × {width}, {way}"
                report.case(title, partial(large, report, BANDS[name], length, width, backward), seconds=4)
    # every case below is compiled anew, for some seconds
    _check(report, torch.bfloat16, [name for name in SMALL if name not in FIRST])
    _check(report, torch.float32, [*FIRST, "width 128", "width 256"])
    _check(report, torch.float16, ["causal"])


def _check(report: Report, dtype: torch.dtype, names: Sequence[str]) -> None:
    for name in names[: report.size(None, 1)]:
        title = f"flash, {name}, {str(dtype).removeprefix('torch.')}"
        report.case(title, partial(small, report, *SMALL[name], dtype), seconds=2)


def small(report: Report, band: Band, sizes: tuple[int, ...], dtype: torch.dtype) -> Row:
    """Output, log-sum-exp and gradients against plain torch in float32, from the same numbers."""
    heads, groups, queries, keys, width, of_values = report.size(sizes, (2, 1, 20, 20, 16, 16))
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, heads, width), (2, keys, groups, width), (2, keys, groups, of_values))
    # as projections leave them: [B, T, H, D] in memory
    qkv = [torch.randn(s, generator=generator).to(report.device, dtype) for s in shapes]
    found = _results(lambda *x: flash_attention_triton(*x, band), qkv)
    wanted = _results(lambda *x: flash_attention(*x, band), [x.float() for x in qkv])
    return within(furthest(found, wanted), BOUNDS[dtype])


def _results(attention: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    given = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = attention(*(x.transpose(1, 2) for x in given))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], given, upstream)]


def large(report: Report, band: Band, length: int, width: int, backward: bool) -> Row:
    """In bfloat16 beside torch's flash kernel with its causal flag; it knows no window and computes full attention."""
    length, width = report.size((length, width), (32, 16))
    heads, groups = report.size((HEADS, GROUPS), (2, 1))
    qkv = [
        torch.randn(report.size(ROWS, 1), count, length, width, device=report.device, dtype=torch.bfloat16)
        for count in (heads, groups, groups)
    ]
    sides = {
        "llmctl": pass_of(lambda q, k, v: flash_attention_triton(q, k, v, band)[0], qkv, backward),
        "torch": pass_of(partial(torchs, report), qkv, backward),
    }
    more: Row = {}
    if band.window is None:
        more = within(furthest(sides["llmctl"](), sides["torch"]()), BOUNDS[torch.bfloat16])
    return milliseconds(seconds_in_turn(sides, report, 3), "llmctl", "torch") | more


def torchs(report: Report, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's flash kernel, by whichever it has on a CPU."""
    backends = [SDPBackend.FLASH_ATTENTION] if report.device.type == "cuda" else list(_ANY)
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


_ANY = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


def pass_of(
    function: Callable[..., Tensor], inputs: list[Tensor], backward: bool
) -> Callable[[], list[Tensor]]:
    """One pass: the output, and with `backward` the gradients of the inputs."""
    given = [x.detach().requires_grad_(backward and x.is_floating_point()) for x in inputs]
    differentiable = [x for x in given if x.requires_grad]
    upstream = torch.ones_like(function(*given).detach())

    def work() -> list[Tensor]:
        out = function(*given)
        return [out.detach(), *(torch.autograd.grad(out, differentiable, upstream) if backward else ())]

    return work
