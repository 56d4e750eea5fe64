"""Compiles the Triton kernels for a GPU that is not there, and prints what each needs of it, one JSON line a case.

    python -m tests.kernels.compiled_ahead

A process of its own: it tells Triton that such a GPU is the active one.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llmctl.kernels import flash_triton as kernels
from llmctl.kernels.flash import Band

HOPPER = GPUTarget("cuda", 90, 32)
# name -> band, width, dtype; the kinds a compiler sees differ in nothing else
CASES = {
    "causal": (Band(), 64, torch.bfloat16),
    "open": (Band(causal=False), 64, torch.bfloat16),
    "sliding": (Band(window=70), 64, torch.bfloat16),
    "both ways": (Band(causal=False, window=65), 64, torch.bfloat16),
    "uneven": (Band(), 24, torch.bfloat16),
    "width 128": (Band(), 128, torch.bfloat16),
    "width 128, sliding": (Band(window=70), 128, torch.bfloat16),
    "width 256": (Band(), 256, torch.bfloat16),
    "width 512": (Band(), 512, torch.bfloat16),
    "causal, float16": (Band(), 64, torch.float16),
}


class Absent:
    """A driver of a GPU that nothing is ever run on."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(kernel: Any, *given: Any, **kinds: Any) -> dict[str, int]:
    """Bytes of shared memory, registers of a thread, and bytes of its stack, which holds what registers do not."""
    found = kernel.warmup(*given, grid=(1,), **kinds)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert used is not None, said
    return {"shared": found.metadata.shared, "registers": int(used[1]), "stack": int(used[2])}


def needs(band: Band, width: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Of the forward kernel and of both backward ones."""
    q, k, v = (torch.empty(2, heads, 300, width, dtype=dtype) for heads in (4, 2, 2))
    lse = torch.empty(2, 4, 300)
    strides = tuple(x.stride()[:3] for x in (q, k, v, q))
    sizes, kinds, _ = kernels._arguments(q, k, v, band, backward=False)
    forward = compiled(kernels._forward, q, k, v, q, lse, strides, sizes, 0.125, **kinds)
    sizes, kinds, _ = kernels._arguments(q, k, v, band, backward=True)
    read, of_keys = (q, k, v, q, lse, lse), (k.stride()[:3], v.stride()[:3])
    keys = compiled(kernels._backward_keys, *read, k, v, strides, of_keys, sizes, 0.125, **kinds)
    queries = compiled(kernels._backward_queries, *read, q, strides, q.stride()[:3], sizes, 0.125, **kinds)
    return [forward, keys, queries]


def main() -> None:
    driver.set_active(Absent())
    for name, case in CASES.items():
        print(json.dumps({"name": name, "kernels": needs(*case)}), flush=True)


if __name__ == "__main__":
    main()
