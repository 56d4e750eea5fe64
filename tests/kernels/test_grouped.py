"""Products grouped by expert, path against path, and against one product a token."""

from __future__ import annotations

import pytest
import torch

from llmctl.kernels.grouped import _grouped, _looped, grouped_linear

E, O = 16, 24  # noqa: E741
COUNTS = {"all": [3, 4, 2], "an idle one": [5, 0, 4], "only the last": [0, 0, 9], "nothing": [0, 0, 0]}


def operands(counts: list[int], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(counts), E), *((O, E) for _ in counts)]
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def run(path, counts: list[int], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """The output, and the gradients; zeros where there is none."""
    x, *weights = operands(counts, dtype, device)
    y = path(x, weights, torch.tensor(counts, device=device))
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return [y, *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *weights))]


def token_by_token(x: torch.Tensor, weights: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    expert = torch.arange(len(weights)).repeat_interleave(counts)
    return torch.einsum("ne,noe->no", x, torch.stack(weights)[expert])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_loop_equals_one_product_a_token(counts):
    found = run(grouped_linear, counts, torch.float64)
    for a, b in zip(found, run(token_by_token, counts, torch.float64), strict=True):
        torch.testing.assert_close(a, b)


# torch computes a grouped product on the CPU too, by a loop of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if sum(c)], ids=str)
def test_paths_agree(counts, dtype):
    found = run(_grouped, counts, dtype)
    for a, b in zip(found, run(_looped, counts, dtype), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if sum(c)], ids=str)
def test_paths_agree_on_a_gpu(counts):
    found = run(grouped_linear, counts, torch.bfloat16, "cuda")
    for a, b in zip(found, run(_looped, counts, torch.bfloat16, "cuda"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("path", [_looped, _grouped])
def test_autocast_decides_the_precision(path):
    x, *weights = operands([3, 4, 2], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert path(x, weights, torch.tensor([3, 4, 2])).dtype == torch.bfloat16


def test_counts_must_be_those_of_the_tokens():
    x, *weights = operands([3, 4, 2], torch.float32)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        grouped_linear(x, weights, torch.tensor([3, 4, 1]))
