"""The Triton kernels against FlashAttention in plain torch: on the CPU in Triton's interpreter, which is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from llmctl.kernels import flash_triton
from llmctl.kernels.flash import Band, flash_attention
from llmctl.kernels.flash_triton import can_run, config_of, flash_attention_triton

# name -> band, (heads, groups, queries, keys, width, width of values)
CASES = {
    "causal": (Band(), (2, 2, 150, 150, 16, 16)),
    "grouped": (Band(), (4, 2, 70, 70, 16, 16)),
    "open": (Band(causal=False), (2, 1, 70, 70, 16, 16)),
    "sliding": (Band(window=40), (2, 1, 200, 200, 16, 16)),
    "both ways": (Band(causal=False, window=33), (2, 2, 200, 200, 16, 16)),
    "fewer queries": (Band(scale=0.4), (2, 1, 9, 150, 16, 16)),
    "sliding, fewer queries": (Band(window=70), (2, 1, 9, 150, 16, 16)),
    "uneven widths": (Band(), (2, 2, 40, 40, 24, 12)),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def operands(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads, groups, queries, keys, width, of_values = sizes
    shapes = ((2, queries, heads, width), (2, keys, groups, width), (2, keys, groups, of_values))
    # as projections leave them: [B, T, H, D] in memory
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def results(attention, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, log-sum-exp, and the three gradients."""
    out, lse = attention(*(x.transpose(1, 2) for x in leaves))
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).to(x) for x in (out, lse)]
    (out * weights[0]).sum().add((lse * weights[1]).sum()).backward()
    return [out, lse, *(x.grad for x in leaves)]


def check(name: str, dtype: torch.dtype, device: str) -> None:
    """Raise unless the kernels compute what plain torch computes from the same numbers."""
    band, sizes = CASES[name]
    found = results(lambda *qkv: flash_attention_triton(*qkv, band), operands(sizes, dtype, device))
    exact = [x.detach().float().requires_grad_() for x in operands(sizes, dtype, device)]
    expected = results(lambda *qkv: flash_attention(*qkv, band), exact)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


needs_triton = pytest.mark.skipif(not flash_triton.PRESENT, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not (flash_triton.PRESENT and torch.cuda.is_available()), reason="needs Triton and an NVIDIA GPU"
)


INTERPRETED = [(name, torch.float32) for name in CASES] + [("grouped", torch.bfloat16)]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """One line for each of `INTERPRETED`, from a process of its own: Triton chooses the interpreter at its import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = "from tests.kernels.test_flash_triton import interpret; interpret()"
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def interpret() -> None:
    """Say of each case whether the interpreted kernels are right."""
    for name, dtype in INTERPRETED:
        try:
            check(name, dtype, "cpu")
            print("right", flush=True)
        except AssertionError as error:
            print(" ".join(str(error).split()), flush=True)


@needs_triton
@pytest.mark.parametrize("number", range(len(INTERPRETED)), ids=lambda n: "{} {}".format(*INTERPRETED[n]))
def test_interpreted_kernels_equal_plain_torch(number, said):
    assert said[number] == "right"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_equal_plain_torch(name, dtype):
    check(name, dtype, "cuda")


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_hopper_and_fit_into_it():
    """Compiled without a GPU, for half precision: within shared memory, and next to nothing spilled from registers."""
    words = [sys.executable, "-m", "tests.kernels.compiled_ahead"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 10
    for row in rows:
        for kernel in row["kernels"]:
            assert kernel["shared"] <= 227 * 1024 and kernel["stack"] <= 64, row


def test_without_a_gpu_it_says_so():
    q, k, v = (x.transpose(1, 2) for x in operands(CASES["causal"][1], torch.float32, "cpu"))
    assert not can_run(q)
    with pytest.raises(ValueError, match="need Triton and an NVIDIA GPU"):
        flash_attention_triton(q, k, v, Band())


def test_tiles_by_width():
    assert config_of(64, 2, backward=False).queries == 128
    assert config_of(64, 4, backward=False) == config_of(128, 2, backward=False)
    with pytest.raises(ValueError, match="512 channels of 4 bytes are too wide"):
        config_of(512, 4, backward=True)
