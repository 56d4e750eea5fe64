"""What the device is, and the two ceilings: bytes that can be moved, and products that can be computed."""

from __future__ import annotations

import platform
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from timing import cpu_name, summary

from gpu_parts.measure import seconds_in_turn
from gpu_parts.report import Report, Row, describe

QUERY = "driver_version,memory.total,clocks.max.sm,clocks.mem,power.limit"
LAUNCHES = 100


def run(report: Report) -> None:
    report.case("device", partial(name_of, report))
    if report.device.type == "cuda":
        report.case("driver", driver)
    report.case("software", software)
    report.case("copy", partial(copy_speed, report))
    report.case("product, bfloat16", partial(product_speed, report, torch.bfloat16))
    report.case("product, float32", partial(product_speed, report, torch.float32))
    report.case("cost of one small operation", partial(launch_cost, report))


def name_of(report: Report) -> Row:
    if report.device.type != "cuda":
        return {"value": cpu_name(), "note": f"{torch.get_num_threads()} threads"}
    found = torch.cuda.get_device_properties(0)
    facts = f"{found.multi_processor_count} SMs, {found.total_memory / 2**30:.1f} GiB, sm_{found.major}{found.minor}"
    return {"value": found.name, "note": facts}


def driver() -> Row:
    words = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"value": "unknown", "note": describe(error)}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return {"value": values[0], "note": ", ".join(values[1:])}


def software() -> Row:
    names = ("transformers", "triton", "peft", "bitsandbytes")
    rest = ", ".join(f"{name} {version_of(name)}" for name in names)
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return {
        "value": f"torch {torch.__version__}{cuda}",
        "note": f"Python {platform.python_version()}, {rest}",
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def copy_speed(report: Report) -> Row:
    """Bytes read and bytes written, both counted."""
    source = torch.ones(report.size(2**32, 2**20), dtype=torch.uint8, device=report.device)
    target = torch.empty_like(source)
    seconds = seconds_in_turn({"copy": lambda: target.copy_(source)}, report)["copy"]
    return _figures([2 * source.numel() / each / 1e9 for each in seconds], "GB/s")


def product_speed(report: Report, dtype: torch.dtype) -> Row:
    """Of square matrices of random numbers: zeros would need less power and run faster."""
    size = report.size(8192 if dtype == torch.bfloat16 else 4096, 128)
    a, b = (torch.randn(size, size, device=report.device).to(dtype) for _ in range(2))
    seconds = seconds_in_turn({"product": lambda: a @ b}, report)["product"]
    return _figures([2 * size**3 / each / 1e12 for each in seconds], "TFLOP/s")


def launch_cost(report: Report) -> Row:
    """What a call from Python costs, which a model of small operations is bound by."""
    x = torch.zeros(1, device=report.device)

    def work() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    seconds = seconds_in_turn({"calls": work}, report)["calls"]
    return _figures([each / LAUNCHES * 1e6 for each in seconds], "µs")


def _figures(values: list[float], unit: str) -> Row:
    found = summary(values)
    return {"value": found["median"], "low": found["min"], "high": found["max"], "unit": unit}
