"""`llmctl runs list | show | lineage`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.checkpoints import BEST, STATE, best_of, damage_in, list_checkpoints
from llmctl.cli.options import AsJson
from llmctl.cli.output import age, figure, print_json, print_table, size
from llmctl.cli.run_page import print_run
from llmctl.errors import UserError, nearest
from llmctl.intact import damaged_outputs
from llmctl.manifest import CHECKPOINTS, MANIFEST, read_manifest, run_folder
from llmctl.runs import RUNS, find_parent, find_runs, status_of

Folder = Annotated[
    str | None, typer.Option("--dir", metavar="DIR", help=f"where the runs are; `{RUNS}` when unset")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", hidden=True)]

# The figures worth a column, the most telling first.
TELLING = ("bits_per_byte", "eval_bits_per_byte", "eval_loss", "loss", "perplexity", "bytes_per_token")


def list_runs(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the runs in a folder.

    A run whose manifest cannot be read is listed as damaged, with the reason; the others stand beside it.
    """
    root = runs_root(folder)
    found = [_row(run, root, count) for run, count in sizes_of_runs(root)]
    if as_json:
        print_json(found)
    elif found:
        print_table(
            ("name", "stage", "status", "age", "size", "result"),
            [
                (r["name"], r["stage"], r["status"], age(r["updated"]), size(r["bytes"]), r["result"] or "")
                for r in found
            ],
        )
    else:
        print(f"no runs in {root}")


def runs_root(folder: str | None) -> Path:
    """The folder that holds the runs. Raises UserError for one that was named and is not there."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder", "name the folder that holds the runs")
    return Path(folder) if folder is not None else RUNS


def _row(run: Path, root: Path, count: int) -> dict[str, Any]:
    row = {"name": str(run.relative_to(root)), "path": str(run), "bytes": count}
    try:
        manifest = read_manifest(run)
    except UserError as error:
        reason = error.message.removeprefix(f"{run / MANIFEST}: ")
        return row | {"stage": None, "status": "damaged", "updated": None, "result": f"{MANIFEST}: {reason}"}
    metrics = manifest.get("metrics") or {}
    result = next((f"{name} {figure(metrics[name])}" for name in TELLING if name in metrics), None)
    return row | {
        "stage": manifest.get("stage"),
        "status": status_of(run, manifest),
        "updated": manifest.get("updated"),
        "result": result,
    }


def sizes_of_runs(root: Path) -> list[tuple[Path, int]]:
    """Every run under a folder, as `find_runs`, with the bytes of everything in it, in one pass over the tree.

    Files may vanish meanwhile, for a run may be writing; links are not followed.
    """
    sizes: dict[str, int] = {}
    # a folder, the runs it lies in, and whether a run in it would be listed
    waiting: list[tuple[str, tuple[str, ...], bool]] = [(str(root), (), True)]
    while waiting:
        folder, inside, listed = waiting.pop()
        try:
            with os.scandir(folder) as opened:
                entries = list(opened)
        except OSError:
            continue
        if listed and any(entry.name == MANIFEST for entry in entries):
            sizes[folder] = 0
            inside = (*inside, folder)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shown = listed and entry.name not in (CHECKPOINTS, MANIFEST) and entry.name[0] != "."
                if shown or inside:
                    waiting.append((entry.path, inside, shown))
            elif inside:
                try:
                    count = entry.stat(follow_symlinks=False).st_size
                except OSError:
                    continue
                for run in inside:
                    sizes[run] += count
    return [(path, sizes[str(path)]) for path in sorted(map(Path, sizes))]


def folder_bytes(run: Path) -> int:
    """Bytes of everything in a run folder; links are not followed, and files may vanish meanwhile."""
    return dict(sizes_of_runs(run)).get(run, 0)


def show(run: RunName, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what RUN is, from what, how it went, what is next.

    RUN is the path of a run folder, or a name that `llmctl runs list` shows. Its result files are read and
    held against their hashes; `llmctl runs verify` looks at its checkpoints too. With --json all that its
    manifest holds: hashes, versions, every count.
    """
    path = find_run(run, folder)
    manifest = read_manifest(path)
    manifest["status"] = status_of(path, manifest)
    damaged = damaged_outputs(path, manifest)
    kept = list_checkpoints(path)
    if as_json:
        listed = [
            {"step": one.step, "eval_loss": one.loss, "bytes": one.size, "path": one.path} for one in kept
        ]
        print_json({"path": path, **manifest, "checkpoints": listed, "damaged": damaged})
        return
    print_run(path, manifest, folder_bytes(path))
    _show_changes(manifest.get("recipe_changes") or [])
    if kept:
        best = best_of(kept)
        print(f"\ncheckpoints (MODEL@STEP, MODEL@last; MODEL@best is {BEST})")
        print_table(
            ("step", "held-out loss", "size", ""),
            [(one.step, one.loss, size(one.size), "best" if one is best else "") for one in kept],
        )
    if damaged:
        print("\ndamaged")
        for line in damaged:
            print(f"  {line}")


def _show_changes(changes: list[dict[str, Any]]) -> None:
    """What `--resume-with` changed, and when."""
    for change in changes:
        print(f"\nchanged at step {change.get('step')} ({change.get('time')})")
        fields = change.get("fields")
        for name, both in (fields if isinstance(fields, dict) else {}).items():
            if isinstance(both, dict):
                print(f"  {name}: {both.get('was')!r} -> {both.get('is')!r}")


def lineage(run: RunName, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what RUN was made from.

    Parents are known by the hash of their content, so one that has moved is still found. The files of each run
    are read, and one that is not as it was written is named.
    """
    root = Path(folder) if folder is not None else RUNS
    tree = _origin(find_run(run, folder), root)
    if as_json:
        print_json(tree)
    else:
        _draw(tree)


def _origin(path: Path, root: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run and its parents as nested dicts.

    `found` is False for a parent that is nowhere, and None for one that is not a folder (a hub id).
    """
    node: dict[str, Any] = {"path": str(path), "found": True, "stage": None, "hash": None, "parents": []}
    made = run_folder(path)
    if made is None:
        return node  # a folder that llmctl did not make: its story begins here
    try:
        manifest = read_manifest(path if path.resolve() == made else made)
    except UserError as error:
        return node | {"damaged": [error.message]}
    node |= {"stage": manifest.get("stage"), "hash": manifest.get("hash")}
    node |= {"status": status_of(made, manifest), "damaged": _damage(path, made, manifest)}
    for parent in manifest.get("parents") or []:
        now = find_parent(parent, root) if parent["hash"] else None
        if now is None or parent["hash"] in seen:
            inner = {"path": parent["path"], "found": False if parent["hash"] else None}
            inner |= {"stage": None, "hash": parent["hash"], "parents": []}
        else:
            inner = _origin(now, root, (*seen, parent["hash"]))
            if str(now) != parent["path"]:
                inner["was"] = parent["path"]
        node["parents"].append({"role": parent.get("role"), **inner})
    return node


def _damage(path: Path, run: Path, manifest: dict[str, Any]) -> list[str]:
    if path.resolve() == run:
        return damaged_outputs(path, manifest)
    found = damage_in(path) if (path / STATE).is_file() else None
    return [] if found is None else [found]


def _draw(node: dict[str, Any], margin: str = "", branch: str = "") -> None:
    words = [node["path"]]
    if node.get("role"):
        words.insert(0, f"{node['role']}:")
    if node["stage"]:
        status = node["status"]
        words.append(f"({node['stage']})" if status == "done" else f"({node['stage']}, {status})")
    if node.get("was"):
        words.append(f"moved from {node['was']}")
    if node["found"] is None:
        words.append("from the hub")
    elif not node["found"]:
        words.append(f"missing: nothing here has its hash {node['hash'][:12]}")
    words += [f"DAMAGED: {line}" for line in node.get("damaged", [])]
    print(margin + branch + " ".join(words))
    deeper = margin + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
    for index, parent in enumerate(node["parents"]):
        _draw(parent, deeper, "└─ " if index == len(node["parents"]) - 1 else "├─ ")


def find_run(run: str, folder: str | None) -> Path:
    """A run by path, or by its name below the runs folder. Raises UserError with the nearest name."""
    path = Path(run)
    if path.is_dir():
        return path
    root = Path(folder) if folder is not None else RUNS
    if (root / run).is_dir():
        return root / run
    close = nearest(run, [str(found.relative_to(root)) for found in find_runs(root)])
    hint = f"did you mean `{close}`?" if close else "see `llmctl runs list`"
    raise UserError(f"{run}: no such run", hint)
