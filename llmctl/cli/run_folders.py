"""`llmctl runs verify | rm | rename`: run folders as a whole."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.cli.options import AsJson
from llmctl.cli.output import print_json, size
from llmctl.cli.progress import make_talk
from llmctl.cli.runs import Folder, RunName, find_run, runs_root
from llmctl.errors import CheckFailed, UsageError, UserError
from llmctl.files import disk_errors
from llmctl.intact import bytes_to_verify, verify_run
from llmctl.lock import Lock
from llmctl.manifest import has_manifest, read_manifest
from llmctl.runs import content_hash, find_runs, status_of

MEGABYTE = 1_000_000


def verify(
    run: Annotated[str | None, typer.Argument(metavar="RUN", hidden=True)] = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Read every file of RUN, or of all runs, and compare hashes.

    Results and checkpoints are held against the hashes that were taken when they were written. Exit code 3 if
    a file is damaged.
    """
    root = runs_root(folder)
    paths = [find_run(run, folder)] if run is not None else list(find_runs(root))
    if not paths and not as_json:
        print(f"no runs in {root}")
    total = sum(map(bytes_to_verify, paths)) / MEGABYTE
    found: list[dict[str, Any]] = []
    with make_talk().bar("verifying", total, "MB") as bar:
        for path in paths:
            if not has_manifest(path):
                read_manifest(path)  # says that it is no run
            result = verify_run(path, lambda count: bar.advance(count / MEGABYTE))
            found.append({"path": str(path), **vars(result)})
    if as_json:
        print_json(found)
    for one in [] if as_json else found:
        state = "damaged" if one["damaged"] else "ok" if one["files"] else "nothing to compare"
        print(f"{one['path']}  {state}  {one['files']} files, {size(one['bytes'])}")
        for line in [*one["damaged"], *one["unknown"]]:
            print(f"  {line}")
    wrong = [one for one in found if one["damaged"]]
    if wrong:
        first = wrong[0]["damaged"][0]
        more = f"; {len(wrong)} runs in all" if len(wrong) > 1 else ""
        raise CheckFailed(
            f"{first}{more}", "copy it back from where it is whole, or make the run again with another --out"
        )


def remove(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", hidden=True)],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="delete though other runs were made from it")
    ] = False,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Delete RUN, or several.

    A run that is being written is never deleted; one that others were made from only with --force. On a
    terminal it asks first; elsewhere --yes is needed.
    """
    root = runs_root(folder)
    # one folder may be named in two ways
    paths = list(
        {path.resolve(): path for path in (find_run(run, folder) for run in reversed(runs))}.values()
    )[::-1]
    for path in paths:
        refuse_to_remove(path, paths, root, force)
    sizes = {path: _bytes(path) for path in paths}
    if not yes and not sys.stdin.isatty():
        raise UsageError("nobody is there to be asked", "add --yes to delete without asking")
    freed = []
    for path in paths:
        if not yes and not _agreed(path, sizes[path]):
            continue
        _delete(path)
        freed.append({"path": str(path), "bytes": sizes[path]})
        if not as_json:
            print(f"deleted {path}: {size(sizes[path])} freed")
    if as_json:
        print_json(freed)


def refuse_to_remove(path: Path, together: list[Path], root: Path, force: bool) -> None:
    """Raise UserError if a folder is no run, is in use, or holds or is what other runs need, unless `force`."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {os.readlink(path)}", "name the run folder itself")
    if not has_manifest(path):
        read_manifest(path)  # says that it is no run
    refuse_running(path)
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: is where this command runs", f"`cd {path.resolve().parent}` first")
    if force:
        return
    others = [run for run in find_runs(root) if run.resolve() not in {one.resolve() for one in together}]
    within = [run for run in find_runs(path) if run != path]
    if within:
        raise UserError(f"{path}: holds another run, {within[0]}", "name that one too, or add --force")
    needed = children(path, others)
    if needed:
        shown = ", ".join(str(run) for run in needed[:3]) + (" and more" if len(needed) > 3 else "")
        raise UserError(f"{path}: {shown} was made from it", "delete that first, or add --force")


def refuse_running(path: Path) -> None:
    """Raise UserError if a live process writes a run."""
    holder = Lock(path).holder()
    if holder is not None:
        raise UserError(
            f"{path}: the run is in use by process {holder[0]} on {holder[1]}",
            "stop it first, then run this again",
        )


def children(path: Path, among: list[Path]) -> list[Path]:
    """The runs that have this one, or a checkpoint in it, as a parent: by hash, or by where it lies."""
    digest, place = content_hash(path), path.resolve()
    found = []
    for run in among:
        try:
            parents = read_manifest(run).get("parents") or []
        except UserError:
            continue
        for parent in parents:
            # by place too: a checkpoint, or a run that was not done when it was taken
            if (parent["hash"] and parent["hash"] == digest) or _lies_in(parent["path"], place):
                found.append(run)
                break
    return found


def _lies_in(where: str, place: Path) -> bool:
    try:
        return Path(where).expanduser().resolve().is_relative_to(place)
    except (OSError, RuntimeError, ValueError):
        return False


def _bytes(path: Path) -> int:
    """Bytes that deleting a folder frees, about: those of all files in it, links not followed."""
    total = 0
    for place, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _agreed(path: Path, count: int) -> bool:
    try:
        manifest = read_manifest(path)
        what = f"{manifest.get('stage')}, {status_of(path, manifest)}"
    except UserError:
        what = "damaged"
    print(f"delete {path} ({what}, {size(count)})? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _delete(path: Path) -> None:
    """Remove a folder: first out of sight in one step, so that a kill leaves nothing that looks like a run."""
    with disk_errors(path, "change the permissions of its folder"):
        gone = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name[:100]}-rm-"))
        try:
            os.replace(path, gone / "run")
        except OSError:
            gone.rmdir()
            raise
        shutil.rmtree(gone)


def rename(
    run: RunName,
    name: Annotated[str, typer.Argument(metavar="NEW", hidden=True)],
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Rename RUN to NEW, a name beside it or a path.

    Lineage is kept: runs that were made from it find it by its content.
    """
    path = find_run(run, folder)
    if not has_manifest(path):
        read_manifest(path)  # says that it is no run
    target = Path(name) if "/" in name else path.parent / name
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: is where this command runs", f"`cd {path.resolve().parent}` first")
    if not name or target.name.startswith(".") or target.name == "..":
        raise UsageError(f"`{name}` is not a name for a run", "choose one that does not begin with a dot")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already", "choose another name")
    if target.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{target}: lies inside the run itself", "choose a name beside it")
    refuse_running(path)
    needed = children(path, list(find_runs(runs_root(folder))))
    try:
        with disk_errors(target, "choose another place"):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise UserError(
                f"{target}: on another disk", "copy it there, then `llmctl runs rm` the old one"
            ) from None
        raise UserError(f"{target}: {error.strerror or error}", "choose another name") from None
    if as_json:
        print_json({"path": target, "was": path, "children": needed})
        return
    print(f"{path} is now {target}")
    if needed:
        print(f"made from it, and finding it by its content: {', '.join(map(str, needed))}")
