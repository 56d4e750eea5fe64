"""Where to compute and in which precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from llmctl.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Compute:
    """A device, and the dtype of matrix products there (weights may be wider)."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Run matrix products in `dtype`; does nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises UserError for a device this machine lacks."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise UserError(
            f"--device {name}: not available here", "use --device auto; `llmctl doctor` says what there is"
        )
    return torch.device(name)


def pick_compute(device: str, dtype: str, field: str = "train.dtype") -> Compute:
    """Device and precision by name; `auto` precision is bfloat16 where the hardware multiplies it, else float32.

    `field` is the recipe field that named the precision. Raises UserError for float16 on the CPU,
    where it is several times slower than float32.
    """
    where = pick_device(device)
    if dtype == "auto":
        return Compute(where, torch.bfloat16 if has_fast_bfloat16(where) else torch.float32)
    if dtype == "float16" and where.type == "cpu":
        raise UserError(
            f"{field}: float16 is far slower than float32 on a CPU", "use bfloat16, float32 or auto"
        )
    return Compute(where, DTYPES[dtype])


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bfloat16(cpu_facts())


def cpu_multiplies_bfloat16(facts: dict[str, str]) -> bool:
    """Whether bfloat16 products beat float32 ones, from /proc/cpuinfo.

    AMX and Arm's BF16 do. AVX512-BF16 does on AMD (about 2.5 times float32 on Zen 4), but on Intel
    without AMX it runs at half the speed of float32 (`benchmarks/gemm_dtypes.py`).
    """
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    if flags & {"amx_bf16", "bf16"}:
        return True
    return "avx512_bf16" in flags and facts.get("vendor_id") == "AuthenticAMD"


def cpu_facts() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                facts[name.strip()] = value.strip()
    except OSError:
        return {}
    return facts
