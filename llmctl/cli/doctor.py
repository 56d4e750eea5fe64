"""`llmctl doctor`: what this machine has, against what llmctl was tested with, and how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from llmctl import __version__
from llmctl.cli.options import AsJson
from llmctl.cli.output import echo, print_json, print_table, size
from llmctl.errors import EXIT_USER_ERROR

_HERE = Path(__file__).resolve().parent.parent
# packaged beside the code when installed, at the root of the source else
CONSTRAINTS = (_HERE / "_constraints.txt", _HERE.parent / "constraints.txt")
LEAST_DISK = 5 << 30  # bytes; token shards and a few checkpoints of a small model


@dataclass
class Finding:
    """One line of the report. `state` is ok, note (worth knowing) or missing (must be mended)."""

    name: str
    state: str
    found: str
    mend: str | None = None


def doctor(as_json: AsJson = False) -> None:
    """Check libraries, devices, memory and disk.

    Exit code 1 if something needed is missing."""
    findings = [python_version(), *libraries(), *torch_devices(), *machine()]
    if as_json:
        print_json({"llmctl": __version__, "findings": [asdict(f) for f in findings]})
    else:
        _print(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(EXIT_USER_ERROR)


def _print(findings: list[Finding]) -> None:
    marks = {"ok": "ok", "note": "note", "missing": "MISSING"}
    print_table(("what", "", "found"), [(f.name, marks[f.state], f.found) for f in findings])
    mends = [f for f in findings if f.mend]
    if mends:
        echo("\nto mend:")
        for finding in mends:
            echo(f"  {finding.name}: {finding.mend}")
    wrong = sum(f.state == "missing" for f in findings)
    echo(
        f"\n{wrong} needed {'thing is' if wrong == 1 else 'things are'} missing" if wrong else "\nall is well"
    )


def tested_versions() -> dict[str, str]:
    """Library -> the version llmctl was tested with, from `constraints.txt`; empty if that is lost."""
    file = next((file for file in CONSTRAINTS if file.is_file()), None)
    if file is None:
        return {}
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.strip().lower(): version.strip() for name, version in pairs}


def python_version() -> Finding:
    """The interpreter. A program that runs has a Python that is new enough: pip refuses others."""
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def libraries() -> list[Finding]:
    """One finding a library that llmctl needs, from its own package metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("llmctl") or []
    except metadata.PackageNotFoundError:
        return [Finding("llmctl", "missing", "not installed, only on the path", "pip install -e .")]
    tested = tested_versions()
    needed = [Requirement(line) for line in lines]
    return [
        library(need.name, need.specifier, tested.get(need.name.lower()))
        for need in needed
        if need.marker is None or need.marker.evaluate({"extra": ""})
    ]


def library(name: str, needed: Any, tested: str | None) -> Finding:
    """Compare the installed version of one library.

    Args:
        needed: the versions llmctl accepts, a `SpecifierSet`.
        tested: the one version it was tested with.
    """
    mend = f"pip install '{name}=={tested}'" if tested else f"pip install '{name}{needed}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", mend)
    if not needed.contains(version, prereleases=True):
        return Finding(name, "missing", f"{version}, but llmctl needs {needed}", mend)
    # a local label such as +cpu or +cu128 names a build, not another version
    if tested and version.partition("+")[0] != tested.partition("+")[0]:
        return Finding(name, "note", f"{version}; tested with {tested}")
    return Finding(name, "ok", version)


def torch_devices() -> list[Finding]:
    """The devices torch can compute on, and the number formats each is fast in."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("devices", "missing", f"torch does not load: {error}", "pip install torch")]
    from llmctl.kernels.device import has_fast_bfloat16
    from llmctl.kernels.threads import look

    fast = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
    choice = look()
    found = [
        Finding("cpu", "ok", f"computes in {fast}"),
        Finding("threads", "ok", f"{choice.threads} ({choice.why})"),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        fast = "bfloat16" if has_fast_bfloat16(torch.device("cuda", index)) else "float16, float32"
        words = f"{gpu.name}, {size(gpu.total_memory)}, sm_{gpu.major}{gpu.minor}; computes in {fast}"
        found.append(Finding(f"cuda:{index}", "ok", words))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "ok", "Apple GPU; computes in float32"))
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        found.append(
            Finding(
                "cuda",
                "note",
                "this machine has an NVIDIA driver, but torch sees no GPU",
                "install a CUDA build of torch: see https://pytorch.org/get-started/locally",
            )
        )
    return found


def machine() -> list[Finding]:
    """Memory, and the disk that runs and token shards are written to."""
    import psutil

    from llmctl.recipe.schema import CACHE_DIR
    from llmctl.runs import RUNS

    memory = psutil.virtual_memory()
    found = [Finding("memory", "ok", f"{size(memory.available)} free of {size(memory.total)}")]
    for name, path in (("runs", RUNS.absolute()), ("cache", Path(CACHE_DIR).expanduser())):
        found.append(folder(name, path))
    return found


def folder(name: str, path: Path) -> Finding:
    """Whether a folder can be written, or made, and how much room its disk has."""
    above = path
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding(name, "note", f"{path}: no permission to write", f"chmod u+rwx {above}")
    free = shutil.disk_usage(above).free
    text = f"{path}, {size(free)} free"
    if free < LEAST_DISK:
        return Finding(name, "note", text, f"make room: {size(LEAST_DISK)} or more is comfortable")
    return Finding(name, "ok", text)
