"""Opening a tokenizer by name, telling two apart, and encoding plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.files import read_json
from llmctl.locate import locate
from llmctl.tokenizer.files import CONFIG, DAMAGED, TOKENIZER, check_files, has_own_code, other_vocabularies
from llmctl.tokenizer.parts import Joints, encode_in_parts, needs_parts, starts_in_parts

MODEL_CONFIG = "config.json"
FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # of a repository on the hub

# Parts of tokenizer.json that a call may change on the way (padding=True); not part of its identity.
FLEETING = ("truncation", "padding")

_ALONE = Lock()  # the settings of a backend are changed for a call, which another thread must not see


def load_tokenizer(where: str) -> PreTrainedTokenizerFast:
    """Open the tokenizer of a run folder, a Hugging Face folder or a hub id.

    What exists on this machine is never looked for on the hub.

    Raises:
        UserError: nothing of that name here or on the hub, the hub cannot be reached, the folder
            holds no tokenizer, or one of its files is damaged.
    """
    if not where:
        raise UserError("no tokenizer is named", "name a folder with a tokenizer, or a hub id")
    path = locate(where, FILES, "tokenizer")
    check_files(path)
    return _open(path)


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
    return encode_with(tokenizer.backend_tokenizer, texts, special=False)


def encode_with(backend: Tokenizer, texts: list[str], *, special: bool) -> list[list[int]]:
    """As `encode_batch`, by a tokenizer's backend.

    `special` says whether a special token spelled out in a text is that token, as in a rendered template.
    """
    with _ALONE, _as_it_is(backend, special):
        encode = partial(_ids, backend)
        return encode_in_parts(encode, texts) if needs_parts(texts) else encode(texts)


def joints_of(tokenizer: PreTrainedTokenizerFast) -> Joints:
    """Where the texts of `encode_batch` may be cut."""
    return Joints(partial(encode_batch, tokenizer))


def _ids(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]


def starts_with(backend: Tokenizer, text: str, *, special: bool) -> list[int]:
    """For each id of a text the character at which it begins; slower than `encode_with`."""

    def starts(part: str) -> list[int]:
        return [start for start, _ in backend.encode(part, add_special_tokens=False).offsets]

    with _ALONE, _as_it_is(backend, special):
        return starts_in_parts(starts, partial(_ids, backend), text)


@contextmanager
def _as_it_is(backend: Tokenizer, special: bool) -> Iterator[None]:
    """A backend set to cut and pad nothing; afterwards it is as it was."""
    before = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = not special
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.encode_special_tokens = before[0]
        if before[1] is not None:
            backend.enable_truncation(**before[1])
        if before[2] is not None:
            backend.enable_padding(**before[2])


def _open(path: Path) -> PreTrainedTokenizerFast:
    try:
        # with False it refuses to run code of the folder's own; left out, it asks on the terminal whether to
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=_config(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises whatever its parsers raise, plain Exception included
        raise _unreadable(path, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{path}: has only a slow tokenizer ({type(tokenizer).__name__})",
            f"convert it to {TOKENIZER} first",
        )
    return tokenizer


def _config(path: Path) -> PreTrainedConfig | None:
    """What transformers asks of a model to choose the class of its tokenizer; None where there is no model.

    It would read all of `config.json`, and stumble over what has nothing to do with the tokenizer.
    """
    if not (path / MODEL_CONFIG).is_file():
        return None
    raw = read_json(path / MODEL_CONFIG)
    about = {
        name: raw[name] for name in ("tokenizer_class", "_name_or_path") if isinstance(raw.get(name), str)
    }
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    return AutoConfig.for_model(kind, **about) if known else PreTrainedConfig(**about)


def _unreadable(path: Path, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__).rstrip(".")
    if has_own_code(path):
        return UserError(
            f"{path / CONFIG}: auto_map names code of the tokenizer's own, which is not run",
            f"open it with transformers, and save it as {TOKENIZER}",
        )
    if not (path / TOKENIZER).is_file():
        name = other_vocabularies(path)[0]
        return UserError(
            f"{path}: no {TOKENIZER}, and none can be made of {name}: {reason}",
            f"open it with transformers where that works, and save it as {TOKENIZER}",
        )
    return UserError(f"{path / TOKENIZER}: the tokenizer cannot be read: {reason}", DAMAGED)
