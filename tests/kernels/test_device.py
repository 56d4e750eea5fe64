"""Where and how to compute."""

from __future__ import annotations

import pytest
import torch

from llmctl.errors import UserError
from llmctl.kernels.device import Compute, cpu_multiplies_bfloat16, pick_compute, pick_device

AMD, INTEL = "AuthenticAMD", "GenuineIntel"


@pytest.mark.parametrize(
    ("facts", "fast"),
    [
        ({"vendor_id": AMD, "flags": "fpu avx512f avx512_bf16"}, True),
        ({"vendor_id": AMD, "flags": "fpu avx512f"}, False),
        ({"vendor_id": INTEL, "flags": "fpu avx512f avx512_bf16"}, False),
        ({"vendor_id": INTEL, "flags": "fpu avx512_bf16 amx_tile amx_bf16"}, True),
        ({"Features": "fp asimd bf16"}, True),
        ({}, False),
    ],
)
def test_which_cpus_multiply_bfloat16(facts, fast):
    assert cpu_multiplies_bfloat16(facts) is fast


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(
        UserError, match=r"train\.dtype: float16 is far slower than float32 on a CPU"
    ) as caught:
        pick_compute("cpu", "float16")
    assert caught.value.hint == "use bfloat16, float32 or auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda: not available here") as caught:
        pick_device("cuda")
    assert "llmctl doctor" in caught.value.hint


def test_auto_is_always_something():
    compute = pick_compute("auto", "auto")
    assert compute.dtype in (torch.float32, torch.bfloat16)


def test_autocast_multiplies_in_the_named_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        with Compute(torch.device("cpu"), dtype).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
