"""The run folder: what passes between stages, with a manifest that says where it came from.

    runs/NAME/  run.json  recipe.yaml  metrics.jsonl  run.lock  checkpoints/  + the stage's own output

`status` is running, done, refused (finished, but its own check found it too far from what it was made
from), failed or interrupted. A crash leaves `running`, and `--resume` works from it. The lock holds pid,
host and the start time of the process, so a stale one is told from a live one.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmctl.checkpoints import step_of
from llmctl.errors import Interrupted, UserError
from llmctl.files import clear_leftovers, combined_hash, disk_errors, known_hash, write_atomic, write_json
from llmctl.intact import newest_sound
from llmctl.leftovers import OUTPUT_SUFFIXES, began_as_run, clear_dead, holds_only_a_run
from llmctl.lock import Lock
from llmctl.manifest import (
    CHECKPOINTS,
    FORMAT,
    MANIFEST,
    METRICS,
    RECIPE,
    SAMPLES,
    has_manifest,
    read_manifest,
    run_of,
)
from llmctl.reading import Unreadable, read_text
from llmctl.resume import (
    FREE_ON_RESUME,
    Differences,
    recipe_differences,
    record_of,
    refuse_differences,
    refuse_other_inputs,
)
from llmctl.signals import was_interrupted
from llmctl.versions import versions

RUNS = Path("runs")
ENDED_WITHOUT_RESULT = ("failed", "interrupted", "crashed")

NOT_OUTPUT = (MANIFEST, METRICS, "diverged.json")


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
    if occupied and not resume and has_manifest(path) and read_manifest(path).get("status") == "refused":
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


def output_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every result file directly in a model, tokenizer or run folder."""
    return {
        file.name: known_hash(file)
        for file in sorted(path.iterdir())
        if file.is_file()
        and file.suffix in OUTPUT_SUFFIXES
        and file.name not in NOT_OUTPUT
        and not file.name.startswith(".")
    }


def folder_hash(path: Path) -> str:
    """The identity of a folder by content: two copies in different places have the same."""
    return combined_hash(output_hashes(path))


def finished_metrics(
    stage: str, path: Path, recipe_text: str, *, resume_with: bool = False
) -> dict[str, Any] | None:
    """The metrics of a run that is done; None if there is no run or it is not done.

    Raises UserError if it is the run of another stage, or was made by another recipe, unless the run goes on
    and `resume_with` takes what differs.
    """
    if not has_manifest(path):
        return None
    manifest = read_manifest(path)
    done = manifest.get("status") == "done"
    refuse_differences(path, _differences(stage, path, manifest, recipe_text), done, resume_with)
    return dict(manifest.get("metrics") or {}) if done else None


def accept_refused(stage: str, path: Path, recipe_text: str, **fields: Any) -> dict[str, Any] | None:
    """Take the result of a refused run as it is: its metrics; None if there is no refused run.

    `fields` are its parents, as in `Run.start`. Raises UserError as that does with `resume`, or if the result changed.
    """
    if not has_manifest(path) or read_manifest(path).get("status") != "refused":
        return None
    manifest = read_manifest(path)
    # which base it was is known by its content, not by how its path is written
    found = _differences(stage, path, manifest, recipe_text, (*FREE_ON_RESUME, "base"))
    refuse_differences(path, found, done=True, taken=False)
    refuse_other_inputs(path, manifest, fields)
    if folder_hash(path) != manifest["hash"]:
        raise UserError(f"{path}: has changed since its check refused it", "make it anew with another --out")
    write_json(path / MANIFEST, manifest | {"status": "done", "accepted": _now()})
    return dict(manifest.get("metrics") or {})


def refuse_refused(folder: Path) -> None:
    """Raise UserError if a folder is a run whose result was refused by its own check and not accepted since."""
    manifest = run_of(folder)
    if manifest is not None and manifest.get("status") == "refused":
        raise UserError(
            f"{folder}: its own check refused it: {'; '.join(manifest.get('refused') or [])}",
            f"the `llmctl {manifest.get('stage')}` command that made it takes it with --out {folder} --accept",
        )


def find_runs(root: Path = RUNS) -> Iterator[Path]:
    """Every run folder under `root`, at any depth, in order of name. Checkpoints are not runs.

    A folder counts by having a manifest, whatever that is; links to folders are not followed.
    """
    if not root.is_dir():
        return
    for folder, names, files in os.walk(root):
        if MANIFEST in files or MANIFEST in names:
            yield Path(folder)
        names[:] = sorted(n for n in names if n not in (CHECKPOINTS, MANIFEST) and not n.startswith("."))


def find_parent(parent: dict[str, Any], root: Path = RUNS) -> Path | None:
    """Where a parent lies now: at its recorded path if the content still matches, else found by hash."""
    path = Path(parent["path"])
    if path.is_dir() and content_hash(path) == parent["hash"]:
        return path
    return find_by_hash(parent["hash"], path, root)


def find_by_hash(digest: str, was: Path, root: Path = RUNS) -> Path | None:
    """The run under `root` with this hash, or, if `was` is a checkpoint, the checkpoint of that name in a run there."""
    of_checkpoint = was.parent.name == CHECKPOINTS
    for run in find_runs(root):
        place = run / CHECKPOINTS / was.name if of_checkpoint else run
        if place.is_dir() and content_hash(place) == digest:
            return place
    return None


def content_hash(path: Path) -> str | None:
    """The hash that a run's manifest records, without reading the files; else that of the files. None if unreadable."""
    if has_manifest(path):
        try:
            recorded = read_manifest(path).get("hash")
        except UserError:
            recorded = None
        if recorded:
            return str(recorded)
    try:
        return folder_hash(path)
    except OSError:
        return None


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
        resume_with: bool = False,
        afresh: bool = False,
        **fields: Any,
    ) -> Run:
        """Make the folder (or reopen it with `resume`) and write manifest and resolved recipe.

        Args:
            recipe_text: the resolved recipe as YAML, from `dump_recipe`.
            resume_with: a recipe and data that differ are taken, and written down in the manifest.
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
            manifest: dict[str, Any] = {"stage": stage, "created": _now()}
            if resume and has_manifest(path):
                manifest = read_manifest(path)
                changes = _differences(stage, path, manifest, recipe_text)
                refuse_differences(path, changes, manifest.get("status") == "done", resume_with)
                changes |= refuse_other_inputs(path, manifest, fields, resume_with)
                manifest["resumed"] = [*(manifest.get("resumed") or []), _now()]
                _note_changes(manifest, changes, path)
            manifest |= {
                "format": FORMAT,
                "status": "running",
                "recipe": record_of(recipe_text),
                "versions": versions(),
                "command": shlex.join(sys.argv[1:]),
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


def _differences(
    stage: str, path: Path, manifest: dict[str, Any], recipe_text: str, free: Sequence[str] = FREE_ON_RESUME
) -> Differences:
    if manifest.get("stage") != stage:
        raise UserError(
            f"{path}: holds a `{manifest.get('stage')}` run, not `{stage}`", "choose another --out"
        )
    recorded = None
    if manifest.get("recipe") is None:  # of format 1
        try:
            recorded = read_text(path / RECIPE)
        except FileNotFoundError:
            recorded = None
        except Unreadable as error:
            raise UserError(f"{path / RECIPE}: {error}", "start a new run with another --out") from None
    return recipe_differences(path, manifest, recorded, recipe_text, content_hash, free)


def _note_changes(manifest: dict[str, Any], changes: Differences, path: Path) -> None:
    """Write down what `--resume-with` changed, when, and at which step."""
    if not changes:
        return
    found, _ = newest_sound(path)
    note = {
        "time": _now(),
        "step": 0 if found is None else step_of(found),
        "fields": {name: {"was": was, "is": now} for name, (was, now) in changes.items()},
    }
    manifest["recipe_changes"] = [*(manifest.get("recipe_changes") or []), note]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# fmt: off
__all__ = [  # what belongs to a run folder is imported from here, wherever it is defined
    "CHECKPOINTS", "FREE_ON_RESUME", "MANIFEST", "METRICS", "RECIPE", "RUNS", "SAMPLES",
    "Parent", "Run", "RunResult", "accept_refused", "check_out", "content_hash", "default_out",
    "find_by_hash", "find_parent", "find_runs", "finished_metrics", "folder_hash", "has_manifest",
    "output_hashes", "read_manifest", "refuse_refused", "run_of", "status_of",
]
# fmt: on
