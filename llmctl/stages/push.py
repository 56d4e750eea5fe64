"""`llmctl push`: the result of a run as a repository on the hub, with a model card. No torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.figures import size
from llmctl.files import read_json
from llmctl.runs import RUNS, output_hashes, read_manifest, refuse_refused, status_of
from llmctl.stages.hub import LOGIN, check_name, hub_errors
from llmctl.stages.model_card import CARD, model_card
from llmctl.summary import TRAINING, is_adapter, parents
from llmctl.talk import Talk

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"  # as PEFT's config calls it
TEMPLATES = "additional_chat_templates"


def run(
    where: str,
    name: str,
    talk: Talk,
    *,
    private: bool = False,
    update: bool = False,
    base: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload the result files of a finished run, and nothing else of its folder.

    Args:
        private: a new repository is private; else it is what the account makes by default.
        update: the repository may exist.
        base: the hub id of an adapter's base.
        dry_run: only say what would be uploaded.

    Returns repository, url, private, files (name and bytes), and the card.

    Raises UserError: not a run, not done, refused or changed since; an adapter whose base is not on the hub;
    what the hub refuses.
    """
    check_name(name)
    if base is not None:
        check_name(base)
    folder = _folder(where)
    manifest = read_manifest(folder)
    _refuse_unfinished(folder, manifest)
    names = _intact(folder, manifest)
    known = _base_on_hub(folder, manifest, base)
    card = model_card(name, folder, manifest, known)
    made = {CARD: card, **_rewritten(folder, known)}
    files = [
        {"name": one, "bytes": len(made[one].encode()) if one in made else (folder / one).stat().st_size}
        for one in sorted({*names, *made})
    ]
    from huggingface_hub import constants

    told = {"repository": name, "url": f"{constants.ENDPOINT}/{name}", "private": private, "files": files}
    if not dry_run:
        total = sum(one["bytes"] for one in files)
        talk.say(f"uploading {len(files)} files, {size(total)}, to {told['url']}")
        _upload(folder, name, names, made, private=private, update=update)
    return told | {"card": card}


def _folder(where: str) -> Path:
    path = Path(where).expanduser()
    return RUNS / where if not path.is_dir() and (RUNS / where).is_dir() else path


def _refuse_unfinished(folder: Path, manifest: Mapping[str, Any]) -> None:
    refuse_refused(folder)
    status = status_of(folder, dict(manifest))
    if status == "done":
        return
    stage = manifest.get("stage")
    go_on = (
        f"`llmctl {stage} --out {folder} --resume` goes on with it" if stage in TRAINING else "run it again"
    )
    raise UserError(
        f"{folder}: the run is {status}, so it has no result to push",
        "wait until it is done" if status == "running" else go_on,
    )


def _intact(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The names of the result files. Raises UserError if one is not what the run wrote."""
    recorded = manifest.get("outputs")
    if not isinstance(recorded, dict) or not recorded:
        raise UserError(f"{folder}: its manifest names no result files", "run it again, then push")
    now = output_hashes(folder)
    for file, digest in recorded.items():
        if now.get(file) != digest:
            what = "has changed since the run wrote it" if file in now else "is missing"
            raise UserError(
                f"{folder / file}: {what}", "put it back, or make the run anew; only intact runs are pushed"
            )
    more = sorted((folder / TEMPLATES).glob("*.jinja")) if (folder / TEMPLATES).is_dir() else []
    return [*recorded, *(f"{TEMPLATES}/{file.name}" for file in more)]


def _base_on_hub(folder: Path, manifest: Mapping[str, Any], base: str | None) -> str | None:
    """The hub id of what the run was made from. Raises UserError if an adapter's base is only here."""
    above = next((one for one in parents(manifest) if one.get("role") == "model"), None)
    known = base or (str(above["path"]) if above is not None and not above.get("hash") else None)
    if known is None and is_adapter(manifest):
        raise UserError(
            f"{folder}: an adapter, whose base {above.get('path') if above else ''} is a folder here",
            f"merge it first: `llmctl merge {folder}`; or say with --base USER/NAME where its base is on the hub",
        )
    return known


def _rewritten(folder: Path, base: str | None) -> dict[str, str]:
    """The adapter's config with its base on the hub, in place of a folder of this machine."""
    if base is None or not (folder / ADAPTER_CONFIG).is_file():
        return {}
    return {ADAPTER_CONFIG: json.dumps(read_json(folder / ADAPTER_CONFIG) | {BASE: base}, indent=2) + "\n"}


def _upload(
    folder: Path, name: str, names: list[str], made: Mapping[str, str], *, private: bool, update: bool
) -> None:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("no token for the hub", LOGIN)
    hub = HfApi(library_name="llmctl")
    with hub_errors(name, writing=True):
        hub.create_repo(name, private=private or None, exist_ok=update)
    with tempfile.TemporaryDirectory(prefix="llmctl-push-") as temporary:
        target = Path(temporary)
        for one in names:
            if one not in made:
                (target / one).parent.mkdir(exist_ok=True)
                (target / one).symlink_to((folder / one).resolve())
        for one, text in made.items():
            (target / one).write_text(text, encoding="utf-8")
        try:
            with hub_errors(name, writing=True):
                hub.upload_folder(
                    repo_id=name, folder_path=target, commit_message=f"llmctl push {folder.name}"
                )
        except UserError as error:
            if not update:  # the repository is there now
                raise UserError(error.message, f"{error.hint}; add --update when you run it again") from error
            raise
