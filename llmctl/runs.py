"""The run folder: what passes between stages, with a manifest that says where it came from.

    runs/NAME/  run.json  recipe.yaml  metrics.jsonl  run.lock  checkpoints/  + the stage's own output

`status` is running, done, refused (finished, but its own check found it too far from what it was made
from), failed or interrupted. A crash leaves `running`, and `--resume` works from it. The lock holds pid, host and the start time of the process, so a stale one is told from a
live one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmctl.errors import Interrupted, UserError
from llmctl.files import clear_leftovers, combined_hash, disk_errors, file_hash, write_atomic, write_json
from llmctl.leftovers import MANIFEST, OUTPUT_SUFFIXES, began_as_run, clear_dead, holds_only_a_run
from llmctl.lock import Lock
from llmctl.signals import was_interrupted
from llmctl.versions import versions

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CHECKPOINTS = "checkpoints"
RUNS = Path("runs")
ENDED_WITHOUT_RESULT = ("failed", "interrupted", "crashed")

NOT_OUTPUT = (MANIFEST, METRICS, "diverged.json")

# Fields that may differ between the run and its resumption: they say where and how, not what, to compute.
# (Another device or thread count may round differently.)
FREE_ON_RESUME = (
    "out",
    "device",
    "train.threads",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "compare.threads",
    "quantize.threads",
)


@dataclass
class RunResult:
    """What a stage hands back to the command line."""

    path: Path | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parent:
    """Something a run was made from. `hash` finds it again when `path` has moved."""

    role: str
    path: str
    hash: str


def default_out(stage: str) -> Path:
    """The next free `runs/STAGE-NNN`."""
    number = 1
    while (RUNS / f"{stage}-{number:03d}").exists():
        number += 1
    return RUNS / f"{stage}-{number:03d}"


def check_out(path: Path, resume: bool = False, *, resumable: bool = True, afresh: str | None = None) -> None:
    """Refuse, before any work, an output folder that cannot or should not be written.

    Args:
        resume: the folder may hold a run, which goes on; nothing else that lies there is overwritten.
        resumable: whether the command has --resume, for the hint.
        afresh: the stage of a command that begins anew where a run of that stage ended without a result.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, but --out names a folder", "choose another name")
    with disk_errors(path):
        occupied = path.is_dir() and any(path.iterdir())
    if occupied and not resume and (path / MANIFEST).is_file() and read_manifest(path)["status"] == "refused":
        raise UserError(
            f"{path}: holds a result that its own check refused",
            "add --accept to take it as it is, or choose another --out",
        )
    if occupied and not resume and not (afresh and _is_dead(path, afresh)):
        go_on = ", or add --resume to go on with it" if resumable else ""
        raise UserError(f"{path}: the folder is not empty", f"choose another --out{go_on}")
    if occupied and not began_as_run(path):
        raise UserError(f"{path}: not a run, so there is nothing to resume", "choose another --out")
    above = path
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise UserError(f"{above}: is a file, so {path} cannot be made", "choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above}: no permission to write", "choose another folder with --out")


def _is_dead(path: Path, stage: str) -> bool:
    """Whether a folder is what a run of `stage` left that ended without a result, and holds nothing else."""
    if not holds_only_a_run(path):
        return False
    if not (path / MANIFEST).is_file():
        return began_as_run(path)
    manifest = read_manifest(path)
    return manifest.get("stage") == stage and status_of(path, manifest) in ENDED_WITHOUT_RESULT


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises UserError if there is none or it is not JSON."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not a run folder (no {MANIFEST})", "see `llmctl runs list`") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(
            f"{file}: not valid JSON", "the manifest was damaged; the weights may still load"
        ) from None
    if not isinstance(manifest, dict):
        raise UserError(f"{file}: not a manifest", "the manifest was damaged; the weights may still load")
    return manifest


def run_of(path: Path) -> dict[str, Any] | None:
    """The manifest of the run that a folder is, or is a checkpoint of; None if it is neither."""
    path = path.expanduser().resolve()
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    return read_manifest(run) if (run / MANIFEST).is_file() else None


def output_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every result file directly in a model, tokenizer or run folder."""
    return {
        file.name: _known_hash(file, *_stamp(file))
        for file in sorted(path.iterdir())
        if file.is_file()
        and file.suffix in OUTPUT_SUFFIXES
        and file.name not in NOT_OUTPUT
        and not file.name.startswith(".")
    }


@lru_cache(maxsize=1024)
def _known_hash(file: Path, size: int, changed: int) -> str:
    """The hash of a file in this state: a base is asked for several times in a command."""
    return file_hash(file)


def _stamp(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def folder_hash(path: Path) -> str:
    """The identity of a folder by content: two copies in different places have the same."""
    return combined_hash(output_hashes(path))


def finished_metrics(stage: str, path: Path, recipe_text: str) -> dict[str, Any] | None:
    """The metrics of a run that is done; None if there is no run or it is not done.

    Raises UserError if it is the run of another stage, or was made by another recipe.
    """
    if not (path / MANIFEST).is_file():
        return None
    manifest = read_manifest(path)
    _same_recipe(stage, path, manifest, recipe_text)
    return dict(manifest.get("metrics", {})) if manifest.get("status") == "done" else None


def accept_refused(stage: str, path: Path, recipe_text: str, **fields: Any) -> dict[str, Any] | None:
    """Take the result of a refused run as it is: its metrics; None if there is no refused run.

    `fields` are its parents, as in `Run.start`. Raises UserError as that does with `resume`, or if the result changed.
    """
    if not (path / MANIFEST).is_file() or read_manifest(path).get("status") != "refused":
        return None
    manifest = read_manifest(path)
    # which base it was is known by its content, not by how its path is written
    _same_recipe(stage, path, manifest, recipe_text, (*FREE_ON_RESUME, "base"))
    _same_inputs(path, manifest, fields)
    if folder_hash(path) != manifest["hash"]:
        raise UserError(f"{path}: has changed since its check refused it", "make it anew with another --out")
    write_json(path / MANIFEST, manifest | {"status": "done", "accepted": _now()})
    return dict(manifest.get("metrics", {}))


def refuse_refused(folder: Path) -> None:
    """Raise UserError if a folder is a run whose result was refused by its own check and not accepted since."""
    manifest = run_of(folder)
    if manifest is not None and manifest.get("status") == "refused":
        raise UserError(
            f"{folder}: its own check refused it: {'; '.join(manifest['refused'])}",
            f"the `llmctl {manifest.get('stage')}` command that made it takes it with --out {folder} --accept",
        )


def find_runs(root: Path = RUNS) -> Iterator[Path]:
    """Every run folder under `root`, at any depth, in order of name. Checkpoints are not runs."""
    if not root.is_dir():
        return
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n != CHECKPOINTS and not n.startswith("."))
        if MANIFEST in files:
            yield Path(folder)


def find_parent(parent: dict[str, Any], root: Path = RUNS) -> Path | None:
    """Where a parent lies now: at its recorded path if the content still matches, else found by hash."""
    path = Path(parent["path"])
    if path.is_dir() and _hash_of(path) == parent["hash"]:
        return path
    return next((run for run in find_runs(root) if _hash_of(run) == parent["hash"]), None)


def _hash_of(path: Path) -> str | None:
    if (path / MANIFEST).is_file():
        try:
            recorded = read_manifest(path).get("hash")
        except UserError:
            recorded = None
        if recorded:
            return str(recorded)
    return folder_hash(path)


def status_of(path: Path, manifest: dict[str, Any]) -> str:
    """The status of a run now: `running` in the manifest of a process that is gone is `crashed`."""
    status = str(manifest.get("status", "unknown"))
    return "crashed" if status == "running" and Lock(path).holder() is None else status


class Run:
    """An open run folder: holds the lock, keeps the manifest, and closes with the right status.

    Use as a context manager. Leaving normally without `finish()` or by an error marks the run
    failed; Ctrl-C marks it interrupted.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], lock: Lock) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def start(
        cls,
        stage: str,
        path: Path,
        recipe_text: str,
        *,
        resume: bool = False,
        afresh: bool = False,
        **fields: Any,
    ) -> Run:
        """Make the folder (or reopen it with `resume`) and write manifest and resolved recipe.

        Args:
            recipe_text: the resolved recipe as YAML, from `dump_recipe`.
            afresh: take the place of a run of this stage that ended without a result.
            fields: further manifest entries, such as parents, device, seed.

        Raises:
            UserError: the folder is not empty, not writable, of another stage, or in use; or the
                recipe, the data or a parent differs from the one the run was started with.
        """
        check_out(path, resume, afresh=stage if afresh else None)
        lock = Lock(path)
        lock.acquire()
        try:
            clear_leftovers(path)
            if afresh:
                clear_dead(path)
            manifest: dict[str, Any] = {"format": 1, "stage": stage, "created": _now()}
            if resume and (path / MANIFEST).is_file():
                manifest = read_manifest(path)
                _same_recipe(stage, path, manifest, recipe_text)
                _same_inputs(path, manifest, fields)
                manifest["resumed"] = [*manifest.get("resumed", []), _now()]
            manifest |= {
                "status": "running",
                "versions": versions(),
                "command": " ".join(sys.argv[1:]),
                **fields,
            }
            write_atomic(path / RECIPE, recipe_text)
            run = cls(path, manifest, lock)
            run._write()
            return run
        except BaseException:
            lock.release()
            raise

    def record(self, **fields: Any) -> None:
        """Add entries to the manifest."""
        self.manifest |= fields
        self._write()

    def finish(self, metrics: dict[str, Any], refused: Sequence[str] = (), accept: bool = False) -> None:
        """Mark the run done: hash its outputs, store the final metrics.

        `refused` is what the run's own check found wrong; unless it is accepted, nobody may use the result.
        """
        outputs = output_hashes(self.path)
        self.record(
            status="refused" if refused and not accept else "done",
            refused=list(refused),
            accepted=_now() if refused and accept else None,
            finished=_now(),
            outputs=outputs,
            hash=combined_hash(outputs),
            metrics=metrics,
            error=None,
        )

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def _write(self) -> None:
        self.manifest["updated"] = _now()
        write_json(self.path / MANIFEST, self.manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None and (issubclass(kind, (KeyboardInterrupt, Interrupted)) or was_interrupted()):
                if self.manifest["status"] == "running":  # what is done stays done
                    self._close_with("interrupted", None)
            elif error is not None or self.manifest["status"] == "running":
                self._close_with("failed", str(error) if error else "the stage ended without a result")
        finally:
            self.close()

    def _close_with(self, status: str, error: str | None) -> None:
        try:
            self.record(status=status, error=error)
        except UserError:
            # a full disk must not hide the error that is on its way up; `running` is resumable too
            return


def _same_recipe(
    stage: str, path: Path, manifest: dict[str, Any], recipe_text: str, free: Sequence[str] = FREE_ON_RESUME
) -> None:
    import yaml

    if manifest.get("stage") != stage:
        raise UserError(
            f"{path}: holds a `{manifest.get('stage')}` run, not `{stage}`", "choose another --out"
        )
    file = path / RECIPE
    if not file.is_file():
        return
    old, new = (_flat(yaml.safe_load(text) or {}) for text in (file.read_text(encoding="utf-8"), recipe_text))
    for key in sorted(old.keys() | new.keys()):
        if key not in free and old.get(key) != new.get(key):
            raise UserError(
                f"{path}: {key} was {old.get(key)!r} when the run began, and is {new.get(key)!r} now",
                "resume with the same recipe, or start a new run with another --out",
            )


def _same_inputs(path: Path, manifest: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, was in _inputs(manifest).items():
        if _inputs(fields).get(name, was) != was:
            raise UserError(
                f"{path}: the {name} is not what it was when the run began",
                "put it back, or start a new run with another --out",
            )


def _inputs(entries: dict[str, Any]) -> dict[str, str]:
    """What a run is made from, by content: parents by role, data by use."""
    found = {parent["role"]: parent["hash"] for parent in entries.get("parents", [])}
    uses = entries.get("data", {}).items()
    known = {use: about for use, about in uses if isinstance(about, dict) and "fingerprint" in about}
    return found | {f"{use} data": about["fingerprint"] for use, about in known.items()}


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
