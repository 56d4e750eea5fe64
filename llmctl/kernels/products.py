"""Products with a quantized matrix: x [..., I] -> [..., O].

Paths, one class each; `path_of` names the first that fits:

    int8    fbgemm: each token is two rows of 8 bits, and the products are of integers
    int4    torch's weight-only operator, with tokens in bfloat16
    exact   the matrix in the precision of x for the moment: the definition, on every device

The first two are for the CPU. On any other device the last one runs.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.kernels.packing import pack_words, unpack_words
from llmctl.kernels.quantized import Quantized

INT4_GROUPS = (256, 128, 64, 32)  # inputs that share a scale, as the operator knows them
INT4_OUTPUTS = 16  # its block of outputs
TINY = 1e-30  # keeps a token of zeros from a division by zero


class Product(Protocol):
    """Something that multiplies by one quantized matrix."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the dtype of `x`."""


class ExactProduct:
    """The definition: `Quantized.dequantize`, then an ordinary product. The matrix stays packed between calls."""

    def __init__(self, matrix: Quantized, device: torch.device) -> None:
        self.words = pack_words(matrix.codes, matrix.bits).to(device)
        self.scale = matrix.scale.to(device)
        self.zero = None if matrix.zero is None else matrix.zero.to(device)
        self.bits, self.inputs = matrix.bits, matrix.codes.shape[1]

    @staticmethod
    def fits(matrix: Quantized, device: torch.device) -> bool:
        """Always."""
        return True

    def __call__(self, x: Tensor) -> Tensor:
        codes = unpack_words(self.words, self.bits, self.inputs)
        matrix = Quantized(codes, self.scale, self.zero, self.bits)
        return F.linear(x, matrix.dequantize().to(x.dtype))


class Int8Product:
    """Weights of 8 bits, tokens in 16: each token is the sum of two rows of 8-bit numbers, for fbgemm's kernel.

    One row of 8 bits loses what a real model needs: beside the few large values of a token its small ones fall
    between the steps (Dettmers et al. 2022, arXiv:2208.07339). The second row holds what the first one lost, in
    steps 2 * `peak` times finer. A product of one token reads the weights once either way.

    All that a token which is not finite gives is NaN.
    """

    def __init__(self, matrix: Quantized, device: torch.device) -> None:
        self.packed = _pack_bytes(matrix.codes, matrix.scale.squeeze(1))
        self.peak = 127 if _multiplies_bytes_exactly() else 63

    @staticmethod
    def fits(matrix: Quantized, device: torch.device) -> bool:
        """8 bits, one scale a row, no zeros, and a CPU that fbgemm knows."""
        plain = matrix.bits == 8 and matrix.zero is None and matrix.scale.shape[1] == 1
        return plain and device.type == "cpu" and torch.backends.quantized.engine in ("x86", "fbgemm")

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).float()
        tokens, finer = flat.shape[0], 2.0 * self.peak
        step = flat.abs().amax(-1, keepdim=True).clamp_min_(TINY).div_(self.peak)
        scaled = flat / step
        coarse = scaled.round()
        rows = torch.cat((coarse, scaled.sub_(coarse).mul_(finer)))
        out = _multiply_bytes(rows, self.packed, self.peak)
        out = out[:tokens].add_(out[tokens:], alpha=1 / finer).mul_(step)
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


def _pack_bytes(codes_OI: Tensor, scale_O: Tensor) -> Any:
    """A matrix in fbgemm's own layout."""
    with warnings.catch_warnings():
        # torch means to retire this kind of tensor; the kernel takes weights in no other
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        whole = torch._make_per_channel_quantized_tensor(
            codes_OI, scale_O.double(), torch.zeros_like(scale_O, dtype=torch.long), 0
        )
    return torch.ops.quantized.linear_prepack(whole, None)


def _multiply_bytes(rows: Tensor, packed: Any, peak: int) -> Tensor:
    """Rows of whole numbers in -peak … peak, others are rounded to such, by a packed matrix; float32."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, peak + 1, packed)


class Int4Product:
    """Weights of 4 or 3 bits, tokens in bfloat16, sums in float32."""

    def __init__(self, matrix: Quantized, device: torch.device) -> None:
        group = _int4_group(matrix)
        assert group is not None
        self.group = group
        self.packed = torch._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32) + 8, 2)
        scale = matrix.scale.repeat_interleave(matrix.group // group, dim=1)
        zero = torch.zeros_like(scale)
        if matrix.zero is not None:
            zero = -scale * matrix.zero.repeat_interleave(matrix.group // group, dim=1)
        self.scale_and_zero = torch.stack((scale, zero), dim=-1).bfloat16().transpose(0, 1).contiguous()

    @staticmethod
    def fits(matrix: Quantized, device: torch.device) -> bool:
        """At most 4 bits, in sizes that the operator's blocks divide, on a CPU."""
        whole = matrix.codes.shape[0] % INT4_OUTPUTS == 0 and _int4_group(matrix) is not None
        return matrix.bits <= 4 and device.type == "cpu" and whole

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).bfloat16()
        out = torch._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.scale_and_zero)
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)


def _int4_group(matrix: Quantized) -> int | None:
    """The operator's largest group that divides the matrix's own; None if there is none."""
    return next((size for size in INT4_GROUPS if matrix.group % size == 0), None)


@cache
def _multiplies_bytes_exactly() -> bool:
    """Whether fbgemm sums products of whole bytes without overflow here; found out by trying.

    Without the instructions for it (AVX512-VNNI) it adds pairs of them in 16 bits, so that tokens must be rounded
    to 7 bits instead.
    """
    packed = _pack_bytes(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16))
    out = _multiply_bytes(torch.full((1, 64), 127.0), packed, 127)
    return bool((out == 64 * 127 * 127).all())


PRODUCTS: dict[str, type[Int8Product | Int4Product | ExactProduct]] = {
    "int8": Int8Product,
    "int4": Int4Product,
    "exact": ExactProduct,
}
SAID = {
    "int8": "fbgemm int8, each token as two rows of 8 bits",
    "int4": "torch int4, tokens in bfloat16",
    "exact": "weights written out at each product",
}


def path_of(matrix: Quantized, device: torch.device) -> str:
    """The name of the fastest path that fits; see `PRODUCTS`."""
    return next(name for name, kind in PRODUCTS.items() if kind.fits(matrix, device))
