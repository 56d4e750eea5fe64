"""Codes in words, and products with quantized matrices, against their definitions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from llmctl.kernels.packing import pack_words, unpack_words, words_for
from llmctl.kernels.products import PRODUCTS, ExactProduct, path_of
from llmctl.kernels.quantized import Quantized, rounded_scale

CPU = torch.device("cpu")
# name -> (bits, outputs, inputs, groups, symmetric, the path that must be taken)
CASES = {
    "int8 by channel": (8, 64, 96, 1, True, "int8"),
    "8 bits by group": (8, 64, 96, 3, True, "exact"),
    "8 bits with zeros": (8, 64, 96, 1, False, "exact"),
    "4 bits by group": (4, 48, 128, 4, True, "int4"),
    "4 bits by channel": (4, 48, 128, 1, True, "int4"),
    "4 bits with zeros": (4, 48, 128, 4, False, "int4"),
    "4 bits, odd outputs": (4, 43, 128, 4, True, "exact"),
    "4 bits, odd inputs": (4, 48, 172, 1, True, "exact"),
    "3 bits by group": (3, 32, 64, 2, True, "int4"),
    "3 bits with zeros": (3, 32, 64, 2, False, "int4"),
}


def matrix(name: str) -> Quantized:
    bits, outputs, inputs, groups, symmetric, _ = CASES[name]
    made, half = torch.Generator().manual_seed(bits), 1 << (bits - 1)
    codes = torch.randint(-half, half, (outputs, inputs), generator=made, dtype=torch.int8)
    scale = rounded_scale(torch.rand(outputs, groups, generator=made) * 0.02 + 1e-3)
    zero = torch.randint(-half, half, (outputs, groups), generator=made, dtype=torch.int8)
    return Quantized(codes, scale, None if symmetric else zero, bits)


def definition(m: Quantized) -> torch.Tensor:
    """W[o, i] = (codes[o, i] - zero[o, g]) · scale[o, g], a weight at a time."""
    whole = torch.empty(m.codes.shape, dtype=torch.float64)
    for o in range(whole.shape[0]):
        for i in range(whole.shape[1]):
            g = i // m.group
            zero = 0 if m.zero is None else int(m.zero[o, g])
            whole[o, i] = (int(m.codes[o, i]) - zero) * float(m.scale[o, g])
    return whole


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("count", [1, 7, 32, 43, 172])
def test_words_are_those_of_compressed_tensors_and_give_the_codes_back(bits: int, count: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, count), dtype=torch.int8)
    words = pack_words(codes, bits)
    assert words.shape == (5, words_for(count, bits))
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_words(words, bits, count), codes)


def test_scales_are_rounded_up_to_bfloat16() -> None:
    scale = torch.rand(1000) * 1e-2
    stored = rounded_scale(scale)
    assert torch.equal(stored, stored.bfloat16().float())
    assert bool((stored >= scale).all()) and bool((stored <= scale * (1 + 2**-7)).all())


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_stands_for_its_definition(name: str) -> None:
    torch.testing.assert_close(matrix(name).dequantize().double(), definition(matrix(name)))


@pytest.mark.parametrize("name", CASES)
def test_the_exact_product_is_that_of_the_definition(name: str) -> None:
    m = matrix(name)
    x = torch.randn(2, 3, m.codes.shape[1])
    torch.testing.assert_close(
        ExactProduct(m, CPU)(x).double(), x.double() @ definition(m).T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_is_near_and_is_the_one_expected(name: str, tokens: int) -> None:
    m, path = matrix(name), CASES[name][-1]
    assert path_of(m, CPU) == path
    x = torch.randn(1, tokens, m.codes.shape[1], generator=torch.Generator().manual_seed(tokens))
    wanted = x.double() @ definition(m).T
    found = PRODUCTS[path](m, CPU)(x)
    assert found.dtype == x.dtype and found.shape == wanted.shape
    # a token's second row of 8 bits leaves 1/254 of 1/254 of its greatest value as error, bfloat16 2^-9 of each
    bound = {"int8": 1e-4, "int4": 0.006, "exact": 1e-6}[path]
    assert float((found - wanted).norm() / wanted.norm()) < bound


def test_a_small_token_is_not_lost_beside_a_large_one() -> None:
    m = matrix("int8 by channel")
    product = PRODUCTS["int8"](m, CPU)
    small, large = torch.randn(1, 96), torch.randn(1, 96) * 1000
    among = product(torch.cat([large, small]))[1]
    wanted = small.double() @ definition(m).T
    assert float((among - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("path", PRODUCTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_token_that_is_not_finite_gives_nan_and_no_error(path: str, tokens: int) -> None:
    name = next(name for name, case in CASES.items() if case[-1] == path)
    x = torch.ones(tokens, matrix(name).codes.shape[1])
    x[0, 0] = torch.nan
    assert PRODUCTS[path](matrix(name), CPU)(x)[0].isnan().all()


SATURATING = """
import torch
from llmctl.kernels.products import PRODUCTS, ExactProduct
from llmctl.kernels.quantized import Quantized
m = Quantized(torch.randint(64, 127, (64, 256), dtype=torch.int8), torch.ones(64, 1), None, 8)
x, cpu = torch.rand(1, 256), torch.device("cpu")
exact, fast = ExactProduct(m, cpu)(x), PRODUCTS["int8"](m, cpu)(x)
print(float((fast - exact).norm() / exact.norm()))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="an instruction set of x86")
def test_a_processor_whose_byte_products_overflow_gets_narrower_tokens() -> None:
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SATURATING],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert float(done.stdout) < 1e-3


@pytest.mark.parametrize("path", PRODUCTS)
def test_tokens_of_zeros_give_zeros(path: str) -> None:
    name = next(name for name, case in CASES.items() if case[-1] == path)
    m = matrix(name)
    assert not PRODUCTS[path](m, CPU)(torch.zeros(3, m.codes.shape[1])).any()
