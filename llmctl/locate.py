"""MODEL and TOKENIZER arguments: a run folder, a Hugging Face folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from llmctl.errors import UserError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def locate(where: str, files: list[str]) -> Path:
    """The local folder that `where` names; a hub id is downloaded (only `files`, as globs) or found in the cache.

    Raises UserError: no such folder, a file where a folder belongs, no permission, or the hub
    cannot be reached or does not know the name.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{where}: is a file; a model or tokenizer is a folder", "name the folder that holds it"
        )
    if not HUB_ID.match(where) or where.startswith(("runs/", "./", "../")) or "//" in where:
        raise UserError(f"{where}: no such folder", "see `llmctl runs list`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, allow_patterns=files))
    except LocalEntryNotFoundError:
        reason = "is neither a folder here nor in the hub's cache, and the hub cannot be reached"
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "?"
        reason = f"is neither a folder here nor to be had from the hub (HTTP {code})"
    except OSError:
        reason = "is neither a folder here nor in the hub's cache, and the hub cannot be reached"
    raise UserError(f"{where}: {reason}", "check the name; see `llmctl runs list`")
