"""Runs parts one after another, each in a process of its own under a time limit, and keeps all that they reported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent
LEAST = 8.0  # seconds: with less of the budget left no part is started, since importing torch takes as long
POLL = 0.2  # seconds between two looks at what the running part has reported
LOG_TAIL = 4000  # characters of its log that the JSON keeps of a part that went wrong
GOOD = ("ok", "skipped", "not run")

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One entry of the table of parts.

    Attributes:
        target: MODULE:FUNCTION; the function takes a `report.Report`.
        seconds: its time limit.
        needs: packages without which it is skipped.
        title: what it measures, in a few words.
    """

    target: str
    seconds: float
    needs: tuple[str, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Settings:
    """How all parts run.

    Attributes:
        device: cpu or cuda.
        tiny: the sizes of a dry run.
        budget: seconds for all parts together.
        log: the file that everything the parts print is appended to.
    """

    device: str
    tiny: bool
    budget: float
    log: Path


def run_parts(
    parts: Mapping[str, Part],
    settings: Settings,
    publish: Callable[[dict[str, Result]], None],
) -> dict[str, Result]:
    """Run the parts in order; returns their results by name.

    A result has `title`, `status` (ok, failed, timed out, skipped, running or not run), `reason` unless that is ok,
    `seconds`, `limit`, `rows` and, where something went wrong, `log`.

    Args:
        publish: called with all results whenever they have changed, before the first part and during one too.
    """
    results = {
        name: {"title": part.title, "status": "not run", "reason": "not reached", "seconds": 0.0, "rows": []}
        for name, part in parts.items()
    }
    publish(results)
    end = time.monotonic() + settings.budget
    for name, part in parts.items():
        missing = [package for package in part.needs if find_spec(package) is None]
        left = end - time.monotonic()
        if missing:
            results[name] |= {"status": "skipped", "reason": f"no package {', '.join(missing)}"}
        elif left < LEAST:
            results[name] |= {"status": "skipped", "reason": f"the budget of {settings.budget:g} s is spent"}
        else:
            for found in _run(name, part, settings, min(part.seconds, left)):
                results[name] |= found
                publish(results)
        publish(results)
    return results


def failures(results: Mapping[str, Result]) -> list[str]:
    """The parts that failed or ran out of time; one that was skipped is none of them."""
    return [name for name, result in results.items() if result["status"] not in GOOD]


def _run(name: str, part: Part, settings: Settings, limit: float) -> Iterator[Result]:
    """Start a part and yield its result as it stands, each time it has changed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-part-") as folder, settings.log.open("ab") as log:
        log.write(f"\n== {name}\n".encode())
        log.flush()
        rows, begins = Path(folder) / "rows.jsonl", log.tell()
        process = _start(part, settings, limit, rows, log.fileno())
        timed_out, count = False, -1
        try:
            while process.poll() is None:
                spent = time.monotonic() - started
                if spent > limit:
                    timed_out = True
                    break
                found, _ = read_rows(rows)
                if len(found) != count:
                    count = len(found)
                    yield {
                        "status": "running",
                        "reason": "it was interrupted",
                        "seconds": spent,
                        "rows": found,
                    }
                time.sleep(min(POLL, max(0.01, limit - spent)))
        finally:
            _kill(process)
        found, ended = read_rows(rows)
        status = _status(found, ended, process.returncode, limit if timed_out else None)
    result = {"seconds": time.monotonic() - started, "limit": limit, "rows": found, **status}
    if status["status"] not in GOOD:
        result["log"] = settings.log.read_bytes()[begins:].decode(errors="replace")[-LOG_TAIL:]
    yield result


def _start(part: Part, settings: Settings, limit: float, rows: Path, log: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "gpu_parts.child", part.target, "--rows", str(rows)]
    words += ["--device", settings.device, "--seconds", str(limit), *(["--tiny"] if settings.tiny else [])]
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        # no part asks the network for anything
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "2")
    # a group of its own, so that compiler processes go with it; the session stays, so that all go with that
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(file: Path) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
    """The whole rows of a file, and how the part says it ended; None if it did not say."""
    if not file.is_file():
        return [], None
    rows, ended = [], None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line during which it was killed
        if "ended" in row:
            ended = row["ended"]
        else:
            rows.append(row)
    return rows, ended


def _status(
    rows: Collection[Mapping[str, Any]], ended: dict[str, str] | None, code: int, limit: float | None
) -> dict[str, str]:
    bad = [row["name"] for row in rows if row["status"] == "failed"]
    if ended is not None and ended["status"] != "ok":
        return ended
    if ended is None and limit is not None:
        return {"status": "timed out", "reason": f"stopped after {limit:.0f} s"}
    if ended is None:
        return {"status": "failed", "reason": f"the process ended with {_said(code)}"}
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return {"status": "failed", "reason": shown}
    if rows and all(row["status"] == "skipped" for row in rows):
        return {"status": "skipped", "reason": str(next(iter(rows)).get("note", "every case was skipped"))}
    return {"status": "ok", "reason": ""}


def _said(code: int) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
