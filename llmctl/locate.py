"""What is named and lies in a folder here or on the hub: models, tokenizers, data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llmctl.errors import UserError
from llmctl.folders import refuse_other_folder
from llmctl.runs import RUNS

HUB_SECONDS = 10  # how long to wait for the hub's first word

RepoType = Literal["model", "dataset"]


def locate(where: str, files: list[str], what: str = "model") -> Path:
    """The local folder that `where` names. What exists on this machine is never looked for on the hub.

    Args:
        files: globs of what is downloaded from the hub, if it comes to that.
        what: what the folder should hold, for the messages: "model", "tokenizer".

    Raises UserError: no such folder (and whether it lies in `runs/`), a folder of something else, a file where a folder belongs, or a hub that cannot be reached,
    does not know the name or asks for a login.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        if what == "model":
            refuse_other_folder(path)
        return path
    if path.exists():
        raise UserError(f"{path}: is a file, but a {what} is a folder", "name the folder it lies in")
    if path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1 or not where:
        raise UserError(f"{where}: no such folder", f"name a folder with a {what}, or a hub id")
    if "/" not in where and (RUNS / where).is_dir():
        raise UserError(f"{where}: no such folder", f"did you mean `{RUNS / where}`?")
    return download(where, files, "model", f"name a folder with a {what}, or a hub id")


def download(name: str, files: list[str], repo_type: RepoType, hint: str) -> Path:
    """The folder in the hub's cache with what `files` match of a repository; only what is missing is fetched.

    Args:
        files: globs of paths in the repository.
        hint: what to do if `name` cannot be a hub id.

    Raises UserError: as `locate`.
    """
    from huggingface_hub import snapshot_download

    online = _on_hub(name, repo_type, hint)
    try:
        return Path(
            snapshot_download(name, repo_type=repo_type, allow_patterns=files, local_files_only=not online)
        )
    except Exception as error:  # no network shows as one of many errors of many libraries
        place = PLACES[repo_type]
        raise UserError(
            f"{name}: not a {place} here, and the hub cannot be reached",
            f"check the spelling and the network, or name a {place}",
        ) from error


def _on_hub(name: str, repo_type: RepoType, hint: str) -> bool:
    """Whether the hub says it has `name`; False if it cannot be reached (a cached copy may do).

    The library itself would retry for most of a minute before it gives up.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    hub, place = HfApi(), PLACES[repo_type]
    try:
        (hub.dataset_info if repo_type == "dataset" else hub.model_info)(name, timeout=HUB_SECONDS)
    except HFValidationError:
        raise UserError(f"{name}: no such {place}", hint) from None
    except GatedRepoError:
        raise UserError(
            f"{name}: the hub gives it only to those who accepted its terms",
            "accept them on its page, then log in with `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: neither a {place} here nor a {repo_type} on the hub",
            f"check the spelling; a private {repo_type} needs `hf auth login`",
        ) from None
    except Exception:  # no network shows as one of many errors of many libraries
        return False
    return True


# What a name may be here, before it is looked for on the hub.
PLACES: dict[RepoType, str] = {"model": "folder", "dataset": "file or folder"}
