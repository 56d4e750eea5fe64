"""`llmctl runs list | show | lineage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.cli.options import AsJson
from llmctl.cli.output import age, echo, figure, print_json, print_listing, print_table, size
from llmctl.errors import UserError, nearest
from llmctl.runs import RUNS, find_parent, find_runs, read_manifest, status_of

Folder = Annotated[
    str | None, typer.Option("--dir", metavar="DIR", help=f"where the runs are; `{RUNS}` when unset")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", hidden=True)]

# The figures worth a column, the most telling first.
TELLING = ("bits_per_byte", "eval_bits_per_byte", "eval_loss", "loss", "perplexity", "bytes_per_token")
LISTED_APART = ("format", "outputs", "parents", "versions", "metrics")


def list_runs(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the runs in a folder."""
    root = Path(folder) if folder is not None else RUNS
    if folder is not None and not root.is_dir():
        raise UserError(f"{root}: no such folder", "name the folder that holds the runs")
    found = [_row(run, root) for run in find_runs(root)]
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
        echo(f"no runs in {root}")


def _row(run: Path, root: Path) -> dict[str, Any]:
    row = {"name": str(run.relative_to(root)), "path": str(run), "bytes": _bytes(run)}
    try:
        manifest = read_manifest(run)
    except UserError:
        return row | {"stage": None, "status": "damaged", "updated": None, "result": None}
    metrics = manifest.get("metrics") or {}
    result = next((f"{name} {figure(metrics[name])}" for name in TELLING if name in metrics), None)
    return row | {
        "stage": manifest.get("stage"),
        "status": status_of(run, manifest),
        "updated": manifest.get("updated"),
        "result": result,
    }


def _bytes(run: Path) -> int:
    """Bytes of everything in a run folder. Files may vanish meanwhile: the run may be writing."""
    total = 0
    for file in run.rglob("*"):
        try:
            total += file.lstat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def show(run: RunName, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what RUN is.

    RUN is the path of a run folder, or a name that `llmctl runs list` shows."""
    path = _find(run, folder)
    manifest = read_manifest(path)
    manifest["status"] = status_of(path, manifest)
    if as_json:
        print_json({"path": path, **manifest})
        return
    short = {"path": str(path)} | {
        key: value for key, value in manifest.items() if value is not None and key not in LISTED_APART
    }
    print_listing(short)
    for key in ("metrics", "parents", "versions"):
        if manifest.get(key):
            echo()
            print_listing({key: manifest[key]})
    if manifest.get("outputs"):
        echo("\noutputs")
        print_listing({name: digest[:12] for name, digest in manifest["outputs"].items()}, indent=2)


def lineage(run: RunName, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what RUN was made from.

    Parents are known by the hash of their content, so one that has moved is still found.
    """
    root = Path(folder) if folder is not None else RUNS
    tree = _origin(_find(run, folder), root)
    if as_json:
        print_json(tree)
    else:
        _draw(tree)


def _origin(path: Path, root: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run and its parents as nested dicts.

    `found` is False for a parent that is nowhere, and None for one that is not a folder (a hub id).
    """
    node: dict[str, Any] = {"path": str(path), "found": True, "stage": None, "hash": None, "parents": []}
    try:
        manifest = read_manifest(path)
    except UserError:
        return node  # a folder that llmctl did not make: its story begins here
    node |= {"stage": manifest.get("stage"), "hash": manifest.get("hash")}
    node["status"] = status_of(path, manifest)
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
    echo(margin + branch + " ".join(words))
    deeper = margin + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
    for index, parent in enumerate(node["parents"]):
        _draw(parent, deeper, "└─ " if index == len(node["parents"]) - 1 else "├─ ")


def _find(run: str, folder: str | None) -> Path:
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
