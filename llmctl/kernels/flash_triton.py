"""FlashAttention as Triton kernels, forward and backward; flash.py is the same in plain torch.

Dao 2023 (arXiv:2307.08691). The module imports without Triton; `can_run` says whether the kernels run on a tensor.
Tiles are fixed by the head's width instead of tuned at run time, so that a first step is not minutes long and results
do not depend on what was timed fastest.

Shape legend: B rows, H query heads, G key/value heads, T queries, S keys (the queries are the last T of them), D width
of queries and keys, V width of values.

With `TRITON_INTERPRET=1` set before the import, the kernels run on the CPU as Python: for tests. Triton's interpreter
multiplies bfloat16 matrices wrongly, so operands are turned into float32 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmctl.kernels.flash import Band

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit, power_of_2 = triton.jit, triton.next_power_of_2
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    PRESENT = True
    WIDE = tl.constexpr(INTERPRETED)  # what a kernel reads from outside must be a constant of Triton
else:

    def jit(function: Any) -> Any:
        """Leaves a kernel that cannot be compiled as it is."""
        return function

    INTERPRETED = PRESENT = False


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def can_run(x: Tensor) -> bool:
    """Whether the kernels run where this tensor is: on an NVIDIA GPU, or anywhere in Triton's interpreter."""
    return PRESENT and (INTERPRETED or (x.is_cuda and torch.version.cuda is not None))


def flash_attention_triton(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, band: Band
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, V] and log-sum-exp [B, H, T] in float32, as `flash.flash_attention` computes them.

    All operands have one dtype: bfloat16, float16 or float32. Raises ValueError where `can_run` is false, for other
    dtypes, and for heads of more than 1024 bytes.
    """
    if not can_run(q_BHTD):
        raise ValueError("the Triton kernels need Triton and an NVIDIA GPU")
    if {q_BHTD.dtype, k_BGSD.dtype, v_BGSV.dtype} not in ({kind} for kind in DTYPES):
        raise ValueError(f"queries, keys and values must all be of one of {', '.join(map(str, DTYPES))}")
    out, lse = _Flash.apply(*(_rows_whole(x) for x in (q_BHTD, k_BGSD, v_BGSV)), band)
    return out, lse


def config_of(width: int, element_size: int, backward: bool) -> Config:
    """The tiles for a head's width, padded to a power of 2, and bytes of an element."""
    for widest, config in (BACKWARD if backward else FORWARD).items():
        if width * element_size <= 2 * widest:
            return config
    raise ValueError(f"heads of {width} channels of {element_size} bytes are too wide for the Triton kernels")


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        rows, heads, length, _ = q.shape
        # laid out as the tokens are: [B, T, H, V] in memory, so that joining the heads afterwards copies nothing
        out = q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(rows, heads, length, dtype=torch.float32)
        sizes, kinds, config = _arguments(q, k, v, band, backward=False)
        grid = (triton.cdiv(length, config.queries), rows * heads)
        strides = tuple(x.stride()[:3] for x in (q, k, v, out))
        _forward[grid](q, k, v, out, lse, strides, sizes, band.factor(q.shape[-1]), **kinds)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band = band
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = _rows_whole(grads[0])
        delta = ((d_out.float() * out.float()).sum(-1) - grads[1]).contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        sizes, kinds, config = _arguments(q, k, v, ctx.band, backward=True)
        strides = tuple(x.stride()[:3] for x in (q, k, v, d_out))
        given = (q, k, v, d_out, lse, delta)
        factor, rows = ctx.band.factor(q.shape[-1]), q.shape[0]
        grid = (triton.cdiv(k.shape[2], config.keys), rows * k.shape[1])
        of_keys = (dk.stride()[:3], dv.stride()[:3])
        _backward_keys[grid](*given, dk, dv, strides, of_keys, sizes, factor, **kinds)
        grid = (triton.cdiv(q.shape[2], config.queries), rows * q.shape[1])
        _backward_queries[grid](*given, dq, strides, dq.stride()[:3], sizes, factor, **kinds)
        return dq, dk, dv, None


def _rows_whole(x: Tensor) -> Tensor:
    """The kernels take any strides, but the last axis must lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, band: Band, backward: bool
) -> tuple[tuple[int, ...], dict[str, Any], Config]:
    """(H, G, T, S, window), the compile-time arguments, and the tiles."""
    widths = q.shape[-1], v.shape[-1]
    padded = [max(16, power_of_2(width)) for width in widths]
    config = config_of(max(padded), q.element_size(), backward)
    sizes = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], band.window or 0)
    kinds = {
        "D": widths[0],
        "V": widths[1],
        "PAD_D": padded[0],
        "PAD_V": padded[1],
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "CAUSAL": band.causal,
        "WINDOWED": band.window is not None,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    return sizes, kinds, config


# --- kernels ----------------------------------------------------------------------------------------
#
# A tile of x [T, D] is read by `_load`: rows past the end and channels past D are zeros. `strides` are those of
# (q, k, v, out or its gradient), each (row, head, token); `sizes` are (H, G, T, S, window).


@jit
def _load(X, row, head, at, strides, count, width: tl.constexpr, pad: tl.constexpr):
    channel = tl.arange(0, pad)
    place = X + row * strides[0] + head * strides[1] + at[:, None] * strides[2] + channel[None, :]
    return tl.load(place, mask=(at[:, None] < count) & (channel[None, :] < width), other=0.0)


@jit
def _store(X, tile, row, head, at, strides, count, width: tl.constexpr):
    channel = tl.arange(0, tile.shape[1])
    place = X + row * strides[0] + head * strides[1] + at[:, None] * strides[2] + channel[None, :]
    inside = (at[:, None] < count) & (channel[None, :] < width)
    tl.store(place, tile.to(X.dtype.element_ty), mask=inside)


@jit
def _dot(a, b):
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@jit
def _seen(query, key, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    # both count among the keys, as whose last the queries stand
    seen = (key < keys) & (query < keys)
    if CAUSAL:
        seen = seen & (key <= query)
    if WINDOWED:
        seen = seen & (key > query - window)
        if not CAUSAL:
            seen = seen & (key < query + window)
    return seen


@jit
def _keys_of(first, last, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    # the keys from, to (excluded) that queries at first ... last may see
    start, end = 0, keys
    if CAUSAL:
        end = tl.minimum(keys, last + 1)
    if WINDOWED:
        start = tl.maximum(0, first - window + 1)
        if not CAUSAL:
            end = tl.minimum(keys, last + window)
    return start, end


@jit
def _queries_of(first, last, before, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    # the queries, counted among the keys, from, to (excluded) that may see keys at first ... last
    start, end = before, keys
    if CAUSAL:
        start = tl.maximum(before, first)
    if WINDOWED:
        end = tl.minimum(keys, last + window)
        if not CAUSAL:
            start = tl.maximum(before, first - window + 1)
    return start, end


@jit
def _forward(  # noqa: PLR0913
    Q, K, V_, OUT, LSE, strides, sizes, scale,
    D: tl.constexpr, V: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    heads, groups, queries, keys, window = sizes
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    group = head // (heads // groups)
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    before = keys - queries
    first = before + tl.program_id(0) * QUERIES
    q = _load(Q, row, head, at, strides[0], queries, D, PAD_D)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, PAD_V], tl.float32)
    start, end = _keys_of(first, first + QUERIES - 1, keys, window, CAUSAL, WINDOWED)
    for there in range(start, end, KEYS):
        key = there + tl.arange(0, KEYS)
        k = _load(K, row, group, key, strides[1], keys, D, PAD_D)
        scores = _dot(q, tl.trans(k)) * scale
        seen = _seen((before + at)[:, None], key[None, :], keys, window, CAUSAL, WINDOWED)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: no inf - inf
        p = tl.exp(scores - level[:, None])
        faded = tl.exp(most - level)
        total = faded * total + tl.sum(p, 1)
        v = _load(V_, row, group, key, strides[2], keys, V, PAD_V)
        out = faded[:, None] * out + _dot(p.to(v.dtype), v)
        most = higher
    total = tl.where(total == 0.0, 1.0, total)  # rows past the end, which see nothing
    out = out / total[:, None]
    _store(OUT, out, row, head, at, strides[3], queries, V)
    tl.store(LSE + (row * heads + head) * queries + at, most + tl.log(total), mask=at < queries)


@jit
def _score_gradient(q, k, v, d_out, lse, delta, seen, scale):
    # P and dS [QUERIES, KEYS]; dS is P (dP - delta), and delta the sum of P dP over the keys
    scores = _dot(q, tl.trans(k)) * scale
    p = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
    dp = _dot(d_out, tl.trans(v))
    return p, p * (dp - delta[:, None]) * scale


@jit
def _backward_keys(  # noqa: PLR0913
    Q, K, V_, D_OUT, LSE, DELTA, DK, DV, strides, of_keys, sizes, scale,
    D: tl.constexpr, V: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    # one program sums a tile of keys over all query heads that read it, so nothing is added atomically
    heads, groups, queries, keys, window = sizes
    row, group = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    before, first = keys - queries, tl.program_id(0) * KEYS
    k = _load(K, row, group, key, strides[1], keys, D, PAD_D)
    v = _load(V_, row, group, key, strides[2], keys, V, PAD_V)
    dk = tl.zeros([KEYS, PAD_D], tl.float32)
    dv = tl.zeros([KEYS, PAD_V], tl.float32)
    start, end = _queries_of(first, first + KEYS - 1, before, keys, window, CAUSAL, WINDOWED)
    for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
        of_head = (row * heads + head) * queries
        for there in range(start - before, end - before, QUERIES):
            at = there + tl.arange(0, QUERIES)
            q = _load(Q, row, head, at, strides[0], queries, D, PAD_D)
            d_out = _load(D_OUT, row, head, at, strides[3], queries, V, PAD_V)
            lse = tl.load(LSE + of_head + at, mask=at < queries, other=0.0)
            delta = tl.load(DELTA + of_head + at, mask=at < queries, other=0.0)
            seen = _seen((before + at)[:, None], key[None, :], keys, window, CAUSAL, WINDOWED)
            p, ds = _score_gradient(q, k, v, d_out, lse, delta, seen, scale)
            dv += _dot(tl.trans(p.to(d_out.dtype)), d_out)
            dk += _dot(tl.trans(ds.to(q.dtype)), q)
    _store(DK, dk, row, group, key, of_keys[0], keys, D)
    _store(DV, dv, row, group, key, of_keys[1], keys, V)


@jit
def _backward_queries(  # noqa: PLR0913
    Q, K, V_, D_OUT, LSE, DELTA, DQ, strides, of_queries, sizes, scale,
    D: tl.constexpr, V: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    heads, groups, queries, keys, window = sizes
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    group = head // (heads // groups)
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    before = keys - queries
    first = before + tl.program_id(0) * QUERIES
    q = _load(Q, row, head, at, strides[0], queries, D, PAD_D)
    d_out = _load(D_OUT, row, head, at, strides[3], queries, V, PAD_V)
    lse = tl.load(LSE + (row * heads + head) * queries + at, mask=at < queries, other=0.0)
    delta = tl.load(DELTA + (row * heads + head) * queries + at, mask=at < queries, other=0.0)
    dq = tl.zeros([QUERIES, PAD_D], tl.float32)
    start, end = _keys_of(first, first + QUERIES - 1, keys, window, CAUSAL, WINDOWED)
    for there in range(start, end, KEYS):
        key = there + tl.arange(0, KEYS)
        k = _load(K, row, group, key, strides[1], keys, D, PAD_D)
        v = _load(V_, row, group, key, strides[2], keys, V, PAD_V)
        seen = _seen((before + at)[:, None], key[None, :], keys, window, CAUSAL, WINDOWED)
        _, ds = _score_gradient(q, k, v, d_out, lse, delta, seen, scale)
        dq += _dot(ds.to(k.dtype), k)
    _store(DQ, dq, row, head, at, of_queries, queries, D)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# channels of 2 bytes, at most -> tiles
FORWARD = {
    64: Config(queries=128, keys=64, warps=4, stages=3),
    128: Config(queries=128, keys=64, warps=8, stages=2),
    256: Config(queries=64, keys=32, warps=8, stages=2),
    512: Config(queries=32, keys=16, warps=4, stages=1),
}
BACKWARD = {
    64: Config(queries=64, keys=64, warps=4, stages=2),
    128: Config(queries=64, keys=64, warps=8, stages=1),
    256: Config(queries=32, keys=32, warps=8, stages=1),
    512: Config(queries=16, keys=16, warps=4, stages=1),
}
