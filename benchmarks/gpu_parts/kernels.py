"""Every other fast path of llmctl/kernels against its plain reference, with the time of both; forward and backward.

Each case is checked twice: from float32 inputs, and, at the size that is timed, from bfloat16 ones against the reference
from the same numbers in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.flash import pass_of
from gpu_parts.measure import furthest, milliseconds, seconds_in_turn, within
from gpu_parts.report import Report, Row
from llmctl.kernels.attention import PLAIN, Visibility, as_mask, attend
from llmctl.kernels.blocks import block_layout
from llmctl.kernels.buckets import Buckets, attend_buckets, attend_buckets_reference
from llmctl.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from llmctl.kernels.grouped import grouped_linear
from llmctl.kernels.lora import lora_linear, lora_linear_reference
from llmctl.kernels.products import ExactProduct
from llmctl.kernels.reference import attend_reference
from llmctl.kernels.rowwise import rms_norm, rms_norm_reference, rotate, rotate_reference
from llmctl.kernels.ssd import causal_conv, ssd_chunked, ssd_reference
from llmctl.quantize.absmax import absmax

FLOAT32, BFLOAT16 = 1e-4, 2e-2
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A fast path, the definition of the same, and inputs for both.

    Attributes:
        inputs: the differentiable ones.
        beside: what the time is compared with; the definition when None.
        narrow: which inputs may be in bfloat16; all when None.
    """

    fast: Function
    definition: Function
    inputs: Sequence[Tensor]
    beside: tuple[str, Function] | None = None
    narrow: Sequence[int] | None = None

    def rounded(self) -> list[Tensor]:
        """The inputs in bfloat16."""
        chosen = range(len(self.inputs)) if self.narrow is None else self.narrow
        return [x.bfloat16() if index in chosen else x for index, x in enumerate(self.inputs)]


def run(report: Report) -> None:
    torch.manual_seed(0)
    for name, make in CASES.items():
        report.case(f"{name}, float32", partial(checked, report, make), seconds=1)
        report.case(name, partial(timed, report, make), seconds=3)


def checked(report: Report, make: Callable[[Report, bool], Case]) -> Row:
    """Values and gradients at a small size."""
    case = make(report, False)
    found, wanted = (pass_of(each, list(case.inputs), True)() for each in (case.fast, case.definition))
    return within(furthest(found, wanted), FLOAT32, detail=True)


def timed(report: Report, make: Callable[[Report, bool], Case]) -> Row:
    """Values and gradients in bfloat16 at a large size, and the time."""
    case = make(report, not report.tiny)
    inputs = case.rounded()
    other, beside = case.beside or ("definition", case.definition)
    sides = {"llmctl": pass_of(case.fast, inputs, True), other: pass_of(beside, inputs, True)}
    wide = [x.float() for x in inputs]
    difference = furthest(sides["llmctl"](), pass_of(case.definition, wide, True)())
    seconds = seconds_in_turn(sides, report, 3)
    return milliseconds(seconds, "llmctl", other) | within(difference, BFLOAT16)


def _qkv(report: Report, rows: int, heads: int, groups: int, length: int, width: int = 64) -> list[Tensor]:
    return [
        torch.randn(rows, count, length, width, device=report.device) for count in (heads, groups, groups)
    ]


def _attention(report: Report, large: bool, visible: Visibility, length: int, rows: int) -> Case:
    """A path of kernels/attention.py against the definition, and beside torch's kernel under a dense mask."""
    heads, groups = (16, 4) if large else (4, 2)
    mask = as_mask(visible, torch.Size((rows, heads, length, 64)), report.device)
    assert mask is not None
    dense = Visibility("dense", mask=mask)
    return Case(
        lambda q, k, v: attend(q, k, v, visible, PLAIN),
        lambda q, k, v: attend_reference(q, k, v, mask[:, 0] if mask.dim() == 4 else mask[None]),
        _qkv(report, rows, heads, groups, length),
        ("dense mask", lambda q, k, v: attend(q, k, v, dense, PLAIN)),
    )


def causal(report: Report, large: bool) -> Case:
    return _attention(report, large, Visibility("causal"), 4096 if large else 96, 2)


def spans(report: Report, large: bool) -> Case:
    length = 2048 if large else 96
    lengths = (length // 2, length // 4, length - length // 2 - length // 4)
    return _attention(report, large, Visibility("spans", spans=lengths * 2), length, 2)


def many_spans(report: Report, large: bool) -> Case:
    """As pretraining packs a batch: about a hundred documents."""
    length, rows, each = (1024, 32, 256) if large else (96, 2, 24)
    visible = Visibility("spans", spans=(each,) * (rows * length // each))
    return _attention(report, large, visible, length, rows)


def window(report: Report, large: bool) -> Case:
    length, reach, block = (8192, 256, 128) if large else (160, 16, 32)
    layout = block_layout(
        torch.arange(length, device=report.device)[None],
        None,
        lambda query, key: query - key < reach,
        reach - 1,
        block,
        causal=True,
    )
    return _attention(report, large, Visibility("blocks", layout=layout), length, 1)


def buckets(rounds: int, report: Report, large: bool) -> Case:
    length, heads, chunk = (4096, 8, 64) if large else (100, 2, 8)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, length // chunk, (1, heads, rounds, length), generator=generator)
    made = Buckets(index.to(report.device), None, chunk, True)
    return Case(
        lambda q, k, v: attend_buckets(q, k, v, made),
        lambda q, k, v: attend_buckets_reference(q, k, v, made),
        _qkv(report, 1, heads, heads, length),
        ("causal attention", lambda q, k, v: attend(q, k, v, Visibility("causal"))),
    )


def cross_entropy(report: Report, large: bool) -> Case:
    tokens, width, words = (16384, 768, 50_304) if large else (100, 32, 61)
    labels = torch.randint(0, words, (tokens,), device=report.device)
    labels[::7] = -100
    hidden = torch.randn(tokens, width, device=report.device)
    head = torch.randn(words, width, device=report.device) * width**-0.5
    return Case(
        lambda h, w: linear_cross_entropy(h, w, labels),
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        [hidden, head],
    )


def norm(report: Report, large: bool) -> Case:
    x = torch.randn(*((32768, 1024) if large else (50, 64)), device=report.device)
    return Case(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), [x, torch.ones_like(x[0])]
    )  # fmt: skip


def rotation(report: Report, large: bool) -> Case:
    x = torch.randn(*((8, 16, 2048, 64) if large else (2, 2, 30, 16)), device=report.device)
    angles = torch.randn(1, 1, x.shape[2], x.shape[3] // 2, device=report.device)
    cos, sin = angles.cos(), angles.sin()
    return Case(lambda x: rotate(x, cos, sin), lambda x: rotate_reference(x, cos, sin), [x])


def experts(report: Report, large: bool) -> Case:
    """8 experts; the definition is one product for each of them."""
    tokens, width, inner = (16384, 1024, 1408) if large else (96, 16, 24)
    counts = torch.tensor([tokens // 8] * 8, device=report.device)
    counts[0], counts[1] = counts[0] - 5, counts[1] + 5
    x = torch.randn(tokens, width, device=report.device)
    weights = [torch.randn(inner, width, device=report.device) * width**-0.5 for _ in range(8)]
    sizes = counts.tolist()

    def looped(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), weights, strict=True)])

    return Case(lambda x, *w: grouped_linear(x, w, counts), looped, [x, *weights])


def adapter(report: Report, large: bool) -> Case:
    tokens, width, inner, r = (16384, 1024, 2816, 16) if large else (50, 32, 48, 4)
    x = torch.randn(tokens, width, device=report.device)
    frozen = torch.randn(inner, width, device=report.device) * width**-0.5
    a, b = torch.randn(r, width, device=report.device), torch.randn(inner, r, device=report.device)
    return Case(
        lambda x, a, b: lora_linear(x, frozen.to(x.dtype), None, a, b, 0.1),
        lambda x, a, b: lora_linear_reference(x, frozen.to(x.dtype), None, a, b, 0.1),
        [x, a * width**-0.5, b],
    )


def scan(report: Report, large: bool) -> Case:
    """Mamba-2's; the definition goes token by token."""
    rows, length, heads, width, state = (4, 1024, 16, 64, 64) if large else (2, 50, 2, 8, 8)
    shapes = ((rows, length, heads, width), (rows, length, 1, state), (rows, length, 1, state))
    x, B, C = (torch.randn(s, device=report.device) for s in shapes)
    dt = torch.rand(rows, length, heads, device=report.device) * 0.1
    A = -torch.arange(1, heads + 1, device=report.device).float()
    chunk = 256 if large else 16
    return Case(
        lambda x, dt, B, C: ssd_chunked(x, dt, A, B, C, chunk=chunk)[0],
        lambda x, dt, B, C: ssd_reference(x, dt, A, B, C)[0],
        [x, dt, B, C],
        narrow=(0, 2, 3),
    )


def convolution(report: Report, large: bool) -> Case:
    """Beside torch's depthwise convolution of the same taps."""
    rows, length, width = (8, 2048, 1536) if large else (2, 30, 12)
    x = torch.randn(rows, length, width, device=report.device)
    weight = torch.randn(width, 4, device=report.device)

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (3, 0))
        return F.conv1d(padded, weight[:, None].to(x.dtype), groups=width).transpose(1, 2)

    return Case(lambda x, w: causal_conv(x, w)[0], definition, [x, weight])


def written_out(bits: int, report: Report, large: bool) -> Case:
    """One token through a quantized matrix that is written out for it, beside a product with the whole one."""
    outputs, inputs = (8192, 2048) if large else (48, 64)
    matrix = absmax(torch.randn(outputs, inputs, device=report.device), bits, 32)
    product, whole = ExactProduct(matrix, report.device), matrix.dequantize()
    narrow = whole.bfloat16()
    return Case(
        product,
        lambda x: F.linear(x, whole.to(x.dtype)),
        [torch.randn(1, inputs, device=report.device)],
        ("bfloat16 product", lambda x: F.linear(x, narrow.to(x.dtype))),
    )


CASES: dict[str, Callable[[Report, bool], Case]] = {
    "attention, causal": causal,
    "attention, three documents a row": spans,
    "attention, 128 documents of a batch": many_spans,
    "attention by blocks, window 256 of 8192": window,
    "attention in buckets, one round": partial(buckets, 1),
    "attention in buckets, two rounds": partial(buckets, 2),
    "head and cross-entropy": cross_entropy,
    "RMSNorm": norm,
    "rotation": rotation,
    "8 experts": experts,
    "LoRA": adapter,
    "Mamba-2 scan": scan,
    "causal convolution": convolution,
    "one token, 8 bits written out": partial(written_out, 8),
    "one token, 4 bits written out": partial(written_out, 4),
    "one token, 3 bits written out": partial(written_out, 3),
}
