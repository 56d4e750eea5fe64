"""Whether the files of a run are still the bytes that were written: held against the hashes in its manifest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.checkpoints import STATE, WEIGHTS, checkpoints, damage_in, named_checkpoints, read_state
from llmctl.errors import UserError
from llmctl.files import known_hash
from llmctl.manifest import CHECKPOINTS, has_manifest, read_manifest, run_folder
from llmctl.reading import Unreadable
from llmctl.resume import fields_hash

FINISHED = ("done", "refused")  # only these have the result their manifest speaks of
# how transformers' users set their own stop tokens and defaults: a change is told by `verify`, and no reason to refuse
SETTINGS = ("generation_config.json",)
PUT_BACK = "copy the file back from where it is whole, or make the run again; without run.json the folder opens as it is"


@dataclass
class Verified:
    """What a look at every byte of a run gave.

    Attributes:
        damaged: a line for each file that is not as it was written, naming it.
        files: how many files were held against a hash; bytes: of how many bytes.
        unknown: what there is no hash for, in words.
    """

    damaged: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    unknown: list[str] = field(default_factory=list)


def damaged_outputs(
    path: Path, manifest: dict[str, Any], on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """A line for each result file of a finished run that is missing or not as it was written.

    Args:
        on_bytes: told how many bytes each block held that was read.
    """
    if manifest.get("status") not in FINISHED:
        return []
    outputs: dict[str, str] = manifest.get("outputs") or {}

    def look(name: str) -> str | None:
        file = path / name
        try:
            whole = known_hash(file, on_bytes) == outputs[name]
        except FileNotFoundError:
            return f"{file}: is missing"
        except OSError as error:
            return f"{file}: {error.strerror or error}"
        except Unreadable as error:
            return f"{file}: {error}"
        return None if whole else f"{file}: damaged: its bytes are not those that the run wrote"

    from concurrent.futures import ThreadPoolExecutor

    # as many files as there are processors: hashing lets go of the interpreter
    with ThreadPoolExecutor(max(1, min(len(outputs), os.cpu_count() or 1))) as pool:
        return [line for line in pool.map(look, sorted(outputs)) if line is not None]


def refuse_damaged(folder: Path) -> None:
    """Raise UserError, naming the file, if a folder is a finished run, or a checkpoint, with other bytes than written."""
    run = run_folder(folder)
    if run is None:
        return
    place = folder.expanduser().resolve()
    if place != run:
        found = damage_in(place, WEIGHTS) if (place / STATE).is_file() else None
        if found is not None:
            raise UserError(_as_written(found, place, folder), "use another checkpoint of the run")
        return
    manifest = read_manifest(run)
    hashes = {name: one for name, one in (manifest.get("outputs") or {}).items() if name not in SETTINGS}
    lines = damaged_outputs(run, manifest | {"outputs": hashes})
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(_as_written(lines[0], run, folder) + more, PUT_BACK)


def _as_written(line: str, resolved: Path, folder: Path) -> str:
    """A line about a file, with the folder as the user wrote it."""
    return line.replace(str(resolved), str(folder), 1)


class Check:
    """`refuse_damaged` beside something else: begun by making one, ended by `finish`.

    Hashing lets go of the interpreter, so it adds little where a second processor is free. What was hashed ahead,
    while libraries were imported or a tokenizer read, is not hashed again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._error: BaseException | None = None
        # a daemon, so that a command that fails early does not wait for it
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            refuse_damaged(self._folder)
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the result. Raises UserError as `refuse_damaged`."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def verify_run(path: Path, on_bytes: Callable[[int], None] | None = None) -> Verified:
    """Hold every file of a run that has a hash against it: results, checkpoints, and the recipe in the manifest."""
    found = Verified()
    try:
        manifest = read_manifest(path)
    except UserError as error:
        found.damaged.append(error.message)
        manifest = {}
    record = manifest.get("recipe")
    if record is not None and fields_hash(record["fields"]) != record["hash"]:
        found.damaged.append(f"{path / 'run.json'}: the recipe in it is not the one the run began with")
    if manifest.get("status") in FINISHED:
        found.damaged += damaged_outputs(path, manifest, on_bytes)
        for name in manifest.get("outputs") or {}:
            _count(found, path / name)
    elif manifest:
        found.unknown.append("no result yet")
    for folder in named_checkpoints(path):
        damage = damage_in(folder)
        if damage is not None:
            found.damaged.append(damage)
            continue
        hashes = _hashed(folder)
        if not hashes:
            found.unknown.append(
                f"{CHECKPOINTS}/{folder.name}: written without hashes; only sizes were compared"
            )
        for name in hashes:
            _count(found, folder / name)
            if on_bytes is not None:
                on_bytes((folder / name).stat().st_size)
    return found


def bytes_to_verify(path: Path) -> int:
    """How many bytes `verify_run` will read, about."""
    if not has_manifest(path):
        return 0
    try:
        outputs = read_manifest(path).get("outputs") or {}
    except UserError:
        outputs = {}
    files = [path / name for name in outputs]
    files += [folder / name for folder in checkpoints(path) for name in _hashed(folder)]
    return sum(file.stat().st_size for file in files if file.is_file())


def _hashed(folder: Path) -> list[str]:
    hashes = read_state(folder).get("hashes")
    return list(hashes) if isinstance(hashes, dict) else []


def _count(found: Verified, file: Path) -> None:
    if file.is_file():
        found.files += 1
        found.bytes += file.stat().st_size


def newest_sound(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose bytes are those that were written, and the newer ones with what is wrong with them.

    Raises UserError if there are checkpoints and none is whole.
    """
    wrong = []
    for path in reversed(named_checkpoints(run)):
        damage = damage_in(path)
        if damage is None:
            return path, wrong
        wrong.append((path, damage))
    if wrong:
        raise UserError(
            f"{wrong[0][1]}; no checkpoint of the run is whole",
            f"delete {run / CHECKPOINTS} to start the run afresh with the same command",
        )
    return None, []
