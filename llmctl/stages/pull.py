"""`llmctl pull`: a model from the hub as a folder, without pickles unless they are asked for."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.figures import size
from llmctl.files import disk_errors
from llmctl.locate import HUB_SECONDS
from llmctl.plan.disk import refuse_small_disk
from llmctl.stages.hub import check_name, hub_errors
from llmctl.talk import Talk

# of the repository: configs, weights, tokenizer, card and terms
SAFE = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt",
    "additional_chat_templates/*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
WEIGHTS = ("*.safetensors", *PICKLES)
MODELS = ("config.json", "adapter_config.json", "tokenizer.json")  # one of them makes a folder a model
MARK = Path(".cache") / "huggingface"  # what the hub's client keeps in a folder that it downloads to


def run(
    name: str, folder: str | None, talk: Talk, *, allow_pickle: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Download what a model needs into a folder; what is there already is not downloaded again.

    Args:
        folder: `models/` and the model's name when None.
        allow_pickle: weights in pickles too, which can run code when they are opened.

    Returns repository, path, files (name and bytes).

    Raises UserError: a name that is none, a folder of something else, no model in the repository, a disk that is
    too small, what the hub refuses.
    """
    check_name(name)
    out = Path(folder).expanduser() if folder is not None else Path("models") / name.rpartition("/")[2]
    _check_folder(out)
    patterns = [*SAFE, *(PICKLES if allow_pickle else ())]
    files, others = _listed(name, patterns)
    _refuse_no_model(name, files, others)
    told: dict[str, Any] = {"repository": name, "path": str(out), "files": files}
    disk = {"files": sum(one["bytes"] for one in files)}
    refuse_small_disk(out, disk)
    if dry_run:
        return told
    from huggingface_hub import snapshot_download

    talk.say(f"downloading {len(files)} files, {size(disk['files'])}, to {out}")
    with disk_errors(out, "name another folder"), hub_errors(name, writing=False):
        snapshot_download(name, local_dir=out, allow_patterns=[one["name"] for one in files])
    return told


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file", "name another folder: llmctl pull NAME DIR")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_dir():
        raise UserError(
            f"{out}: the folder is not empty, and nothing was pulled into it before",
            "name another folder: llmctl pull NAME DIR",
        )


def _listed(name: str, patterns: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The files that are downloaded, and the names of the others."""
    from huggingface_hub import HfApi

    with hub_errors(name, writing=False):
        about = HfApi(library_name="llmctl").model_info(name, files_metadata=True, timeout=HUB_SECONDS)
    files, others = [], []
    for one in about.siblings or []:
        # a pattern without a folder is of the top one: repositories keep copies for other programs in folders
        inside = "/" in one.rfilename
        wanted = any(fnmatch(one.rfilename, p) for p in patterns if ("/" in p) == inside)
        if wanted:
            files.append({"name": one.rfilename, "bytes": one.size or 0})
        else:
            others.append(one.rfilename)
    return files, others


def _refuse_no_model(name: str, files: list[dict[str, Any]], others: list[str]) -> None:
    names = [one["name"] for one in files]
    if not any(one in names for one in MODELS):
        raise UserError(
            f"{name}: holds no model (no config.json)", "name the repository of a model or tokenizer"
        )
    pickled = [one for one in others if any(fnmatch(one, p) for p in PICKLES)]
    if pickled and not any(fnmatch(one, p) for one in names for p in WEIGHTS):
        raise UserError(
            f"{name}: its weights are only there as pickles ({', '.join(pickled[:3])}), which can run code",
            "if you trust it, add --allow-pickle, then `llmctl convert DIR --allow-pickle` makes safetensors of it",
        )
