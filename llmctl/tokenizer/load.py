"""Opening a tokenizer by name, telling two apart, and encoding plain text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmctl.errors import UserError

TOKENIZER = "tokenizer.json"
HUB_SECONDS = 10  # how long to wait for the hub's first word

# Parts of tokenizer.json that a call may change on the way (padding=True); not part of its identity.
FLEETING = ("truncation", "padding")


def load_tokenizer(where: str) -> PreTrainedTokenizerFast:
    """Open the tokenizer of a run folder, a Hugging Face folder or a hub id.

    What exists on this machine is never looked for on the hub.

    Raises:
        UserError: nothing of that name here or on the hub, the hub cannot be reached, the folder
            holds no tokenizer.json, or it is damaged.
    """
    if not where:
        raise UserError("no tokenizer is named", "name a folder with a tokenizer, or a hub id")
    path = Path(where).expanduser()
    if path.exists():
        _check_folder(path)
        return _open(str(path), path / TOKENIZER)
    if path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1:
        raise UserError(f"{where}: no such folder", "name a folder with a tokenizer, or a hub id")
    return _open(where, None, cached_only=not _on_hub(where))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over all that decides its ids: vocabulary, merges, rules and the special ids.

    The chat template has a hash of its own.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in FLEETING:
        backend[name] = None
    special = [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    ]
    text = json.dumps([backend, special], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The ids of plain texts: no BOS is added, nothing is cut, and text stays text.

    A document that happens to contain `<|eos|>` gets the ids of those seven characters, not the
    special token, so data cannot end a sequence or forge a turn.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        return [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before[0]
        if before[1] is not None:
            backend.enable_truncation(**before[1])
        if before[2] is not None:
            backend.enable_padding(**before[2])


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: is a file, but a tokenizer is a folder", "name the folder it lies in")
    file = path / TOKENIZER
    if not file.is_file():
        raise UserError(
            f"{path}: no tokenizer there (no {TOKENIZER})",
            "make one with `llmctl tokenizer train DATA --out DIR`",
        )
    for part in (file, path / "tokenizer_config.json"):
        if part.is_file():
            _check_json(part)


def _check_json(file: Path) -> None:
    try:
        value = json.loads(file.read_bytes())
    except PermissionError:
        raise UserError(f"{file}: no permission to read", "ask its owner, or copy the folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON", _DAMAGED) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start})", _DAMAGED) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object", _DAMAGED)


_DAMAGED = "the file is damaged; copy or train the tokenizer again"


def _open(where: str, file: Path | None, cached_only: bool = False) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=cached_only or file is not None)
    except Exception as error:  # the library raises whatever its parsers raise, plain Exception included
        if cached_only:
            raise UserError(
                f"{where}: not a folder here, and the hub cannot be reached",
                "check the spelling and the network, or name a folder",
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{file or where}: the tokenizer cannot be read: {first.rstrip('.')}", _DAMAGED
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{where}: has only a slow tokenizer ({type(tokenizer).__name__})",
            f"convert it to {TOKENIZER} first",
        )
    return tokenizer


def _on_hub(name: str) -> bool:
    """Whether the hub says it has `name`; False if it cannot be reached (a cached copy may do).

    The library itself would retry for most of a minute before it gives up.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HFValidationError:
        raise UserError(f"{name}: no such folder", "name a folder with a tokenizer, or a hub id") from None
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
