"""MODEL and TOKENIZER arguments: a run folder, a Hugging Face folder, or a hub id."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import UserError

HUB_SECONDS = 10  # how long to wait for the hub's first word


def locate(where: str, files: list[str], what: str = "model") -> Path:
    """The local folder that `where` names. What exists on this machine is never looked for on the hub.

    Args:
        files: globs of what is downloaded from the hub, if it comes to that.
        what: what the folder should hold, for the messages: "model", "tokenizer".

    Raises UserError: no such folder, a file where a folder belongs, or a hub that cannot be reached,
    does not know the name or asks for a login.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file, but a {what} is a folder", "name the folder it lies in")
    hint = f"name a folder with a {what}, or a hub id"
    if path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1 or not where:
        raise UserError(f"{where}: no such folder", hint)
    from huggingface_hub import snapshot_download

    online = _on_hub(where, hint)
    try:
        return Path(snapshot_download(where, allow_patterns=files, local_files_only=not online))
    except Exception as error:  # no network shows as one of many errors of many libraries
        raise UserError(
            f"{where}: not a folder here, and the hub cannot be reached",
            "check the spelling and the network, or name a folder",
        ) from error


def _on_hub(name: str, hint: str) -> bool:
    """Whether the hub says it has `name`; False if it cannot be reached (a cached copy may do).

    The library itself would retry for most of a minute before it gives up.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HFValidationError:
        raise UserError(f"{name}: no such folder", hint) from None
    except GatedRepoError:
        raise UserError(
            f"{name}: the hub gives it only to those who accepted its terms",
            "accept them on its page, then log in with `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: neither a folder here nor a model on the hub",
            "check the spelling; a private model needs `hf auth login`",
        ) from None
    except Exception:  # no network shows as one of many errors of many libraries
        return False
    return True
