"""benchmarks/gpu.py: parts that fail lose nothing, and every part runs on a CPU, with its optional packages and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import gpu
import psutil
import pytest
from gpu_parts.running import Part, Settings, failures, run_parts
from gpu_parts.table import HEAD, PEAKS, markdown

ROOT = Path(__file__).resolve().parent.parent.parent
MISBEHAVING = "tests.benchmarks.misbehaving:"
# part -> its status, what its reason begins with, and its rows
WANTED = {
    "good": ("failed", "a case that raises", 4),
    "raises": ("failed", "RuntimeError: no kernel image | is available", 1),
    "hangs": ("timed out", "stopped after 3 s", 1),
    "is_killed": ("failed", "the process ended with signal 9 (SIGKILL)", 1),
    "lacks_a_package": ("skipped", "no package no_such_package", 0),
    "lacks_a_module_of_ours": ("failed", "no package llmctl.no_such_module", 0),
    "is_out_of_time": ("skipped", "no time left in this part", 1),
    "not_a_number": ("failed", "a check of a NaN", 1),
    "within_bounds": ("ok", "", 1),
    "needy": ("skipped", "no package no_such_package", 0),
}
QUICK = "device,flash,kernels"


def parts() -> dict[str, Part]:
    found = {name: Part(MISBEHAVING + name, 60) for name in WANTED if name != "needy"}
    return found | {
        "hangs": Part(MISBEHAVING + "hangs", 3),
        "needy": Part(MISBEHAVING + "within_bounds", 60, needs=("no_such_package",)),
    }


@pytest.fixture(scope="module")
def went_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """The results of all misbehaving parts, and every state that was published on the way."""
    log, states = tmp_path_factory.mktemp("gpu") / "gpu.log", []
    settings = Settings("cpu", True, 300.0, log)
    found = run_parts(parts(), settings, lambda results: states.append(json.loads(json.dumps(results))))
    return found, states


@pytest.mark.parametrize("name", WANTED)
def test_a_part_that_goes_wrong_loses_nothing(name: str, went_wrong: tuple[dict, list[dict]]) -> None:
    result, (status, reason, rows) = went_wrong[0][name], WANTED[name]
    assert (result["status"], len(result["rows"])) == (status, rows)
    assert result["reason"].startswith(reason)


def test_rows_say_what_became_of_their_cases(went_wrong: tuple[dict, list[dict]]) -> None:
    rows = {row["name"]: row for row in went_wrong[0]["good"]["rows"]}
    assert rows["before"] == {"name": "before", "status": "ok", "value": 1.5, "unit": "s"}
    assert rows["a case that raises"]["note"] == "ZeroDivisionError: division by zero"
    assert rows["without its package"]["note"] == "no package no_such_package"
    assert rows["without its package"]["status"] == "skipped"
    assert rows["a check that holds"]["status"] == "ok"


def test_only_what_failed_or_hung_counts_as_a_failure(went_wrong: tuple[dict, list[dict]]) -> None:
    bad = {name for name, (status, *_) in WANTED.items() if status in ("failed", "timed out")}
    assert set(failures(went_wrong[0])) == bad


def test_the_log_says_where_a_part_hung(went_wrong: tuple[dict, list[dict]]) -> None:
    assert "misbehaving.py" in went_wrong[0]["hangs"]["log"] and "in hangs" in went_wrong[0]["hangs"]["log"]
    assert "ZeroDivisionError" in went_wrong[0]["good"]["log"]


def test_a_row_is_published_while_its_part_still_runs(went_wrong: tuple[dict, list[dict]]) -> None:
    running = [state["hangs"] for state in went_wrong[1] if state["hangs"]["status"] == "running"]
    assert any(result["rows"] for result in running)


def test_without_budget_no_part_is_started(tmp_path: Path) -> None:
    found = run_parts(parts(), Settings("cpu", True, 1.0, tmp_path / "log"), lambda _: None)
    assert found["good"]["status"] == "skipped" and found["good"]["reason"] == "the budget of 1 s is spent"
    assert not failures(found)


def test_the_table_shows_every_kind_of_row(went_wrong: tuple[dict, list[dict]]) -> None:
    (device,) = [name for name in PEAKS if name == "NVIDIA H200"]
    ceilings = [
        {"name": "device", "status": "ok", "value": device},
        {"name": "copy", "status": "ok", "value": 4000.0, "unit": "GB/s"},
        {"name": "product, bfloat16", "status": "ok", "value": 800.0, "unit": "TFLOP/s"},
    ]
    speeds = [
        {"name": "step", "status": "ok", "value": 1234.5, "low": 1000.0, "high": 2000.0, "unit": "tokens/s",
         "beside": "other: 600 tokens/s", "ratio": 2.0575, "flops": 400e12},
        {"name": "decode", "status": "ok", "value": 900.0, "unit": "tokens/s", "bytes": 2e12},
        {"name": "hidden", "status": "ok", "difference": 0.0, "bound": 1.0, "detail": True},
        {"name": "wrong", "status": "failed", "difference": float("inf"), "bound": 1.0, "detail": True},
    ]  # fmt: skip
    results = {
        "device": {"rows": ceilings, "status": "ok", "reason": ""},
        "speeds": {"rows": speeds, "status": "ok", "reason": ""},
        **went_wrong[0],
    }
    text = markdown(
        {"made": "2026-01-02T03", "command": "c", "device": "cuda", "tiny": False, "parts": results}
    )
    lines = text.splitlines()
    assert lines[0] == "`c`: NVIDIA H200, 2026-01-02."
    assert (
        "| speeds | step | 1,234 tokens/s (1,000–2,000); 400 TFLOP/s; MFU 0.404; 0.500 of the measured product "
        "| other: 600 tokens/s | 2.06 |  |" in lines
    )
    assert (
        "| speeds | decode | 900 tokens/s; 2,000 GB/s of weights; 0.500 of the measured copy |  |  |  |"
        in lines
    )
    assert "hidden" not in text
    assert "| speeds | wrong |  |  |  | inf > 1 **failed** |" in lines
    assert "| hangs | (all) | timed out: stopped after 3 s | | | |" in lines
    assert "| raises | (all) | failed: RuntimeError: no kernel image \\| is available | | | |" in lines
    assert "6 N + 6 L H D (T + 1)" in text and "against 989 TFLOP/s" in text
    start = lines.index(HEAD[0])
    table = lines[start : lines.index("", start)]
    assert all(line.replace("\\|", "").count("|") == 7 for line in table)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "device,nothing"], "no part nothing; there are device, core"),
        (["--parts", ""], "no part named"),
        (["--device", "cuda"], "torch sees no CUDA device here; --device cpu --tiny is the dry run"),
    ],
)
def test_wrong_options(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as left:
        gpu.parse(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def dry_run(out: Path, names: str, code: str = "") -> tuple[subprocess.CompletedProcess[str], dict]:
    """The script as a user starts it, in the interpreter of Triton; `code` goes into a sitecustomize before."""
    (out / "site").mkdir(parents=True)
    (out / "site" / "sitecustomize.py").write_text(code)
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(out / "site"), str(ROOT)]),
    }
    words = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
        "--parts",
        names,
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done, json.loads((out / "gpu.json").read_text())


def check_dry_run(done: subprocess.CompletedProcess[str], document: dict) -> None:
    """Every part is ok, no case failed, and the table is printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    for name, part in document["parts"].items():
        kernels_run = name != "flash" or find_spec("triton")
        assert part["status"] == ("ok" if kernels_run else "skipped"), (name, part["reason"], part.get("log"))
        assert part["rows"]
    assert document["tiny"] and HEAD[0] in done.stdout
    assert {path.name for path in Path(document["command"].split("--out ")[1].split()[0]).iterdir()} == {
        "gpu.json",
        "gpu.md",
        "gpu.log",
        "site",
    }


def test_dry_run(tmp_path: Path) -> None:
    done, document = dry_run(tmp_path / "out", QUICK)
    check_dry_run(done, document)
    rows = {part: [row["name"] for row in found["rows"]] for part, found in document["parts"].items()}
    assert "copy" in rows["device"] and "product, bfloat16" in rows["device"]
    assert len([name for name in rows["kernels"] if name.endswith(", float32")]) >= 16
    skipped = {name for name, part in rows.items() if "Triton kernels" in part}
    assert skipped == (set() if find_spec("triton") else {"flash"})


def test_a_killed_run_leaves_what_was_known_and_no_process(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "device,kernels"]
    with (tmp_path / "said").open("wb") as said:
        run = subprocess.Popen(
            [sys.executable, "benchmarks/gpu.py", *words], cwd=ROOT, stdout=said, stderr=said
        )

    def known() -> dict:
        document = tmp_path / "gpu.json"
        return json.loads(document.read_text())["parts"] if document.is_file() else {}

    wait_until(lambda: bool(known()) and known()["device"]["rows"] != [])
    started = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert started and known()["device"]["rows"][0]["name"] == "device"
    wait_until(lambda: not any(process.is_running() for process in started))


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, for a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(which("make") is None, reason="needs make")
def test_make_runs_it_when_asked_and_not_among_the_benchmarks() -> None:
    def would_run(target: str) -> str:
        words = ["make", "-n", "-o", ".venv/.ready", target]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "benchmarks/gpu.py" in would_run("gpu")
    assert "benchmarks/gemm_dtypes.py" in would_run("bench") and "gpu" not in would_run("bench")


# what a bare machine with torch and transformers lacks
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {"trl", "datasets", "bitsandbytes", "peft", "accelerate", "compressed_tensors"}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
IMPORTED = """
import importlib
for name in ("trl", "peft", "bitsandbytes", "datasets", "accelerate", "compressed_tensors"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")
for name in ("model", "model.checkpoint", "model.open", "model.adapters", "model.nf4", "train.loop", "stages.pretrain",
             "stages.quantize", "stages.generate", "stages.chat", "stages.sft", "quantize.gptq", "engine.session",
             "engine.speed", "kernels.flash_triton", "cli.main"):
    importlib.import_module(f"llmctl.{name}")
"""


def test_the_package_imports_without_what_a_bare_machine_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", BARE + IMPORTED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EVERY = [name for name in gpu.PARTS if name not in ("pretrain-350m", *QUICK.split(","))]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EVERY)
def test_dry_run_of_the_other_parts(name: str, tmp_path: Path) -> None:
    check_dry_run(*dry_run(tmp_path / "out", name))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run_on_a_bare_machine(tmp_path: Path) -> None:
    done, document = dry_run(tmp_path / "out", "device,core,patterns,training,quantized,lora,decoding", BARE)
    assert done.returncode == 0, done.stdout + done.stderr
    status = {name: part["status"] for name, part in document["parts"].items()}
    assert status.pop("lora") == "skipped" and document["parts"]["lora"]["reason"] == "no package peft"
    assert set(status.values()) == {"ok"}
    missing = [row["note"] for row in document["parts"]["quantized"]["rows"] if row["status"] == "skipped"]
    assert missing == ["no package bitsandbytes"]
