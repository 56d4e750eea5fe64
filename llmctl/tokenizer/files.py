"""The files of a tokenizer that stand beside `tokenizer.json`, checked before a library reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.files import json_fault, read_bounded

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
# vocabularies of other formats, out of which transformers can make a tokenizer.json
OTHERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_PATTERNS = ("*.tiktoken",)
DAMAGED = "the file is damaged; copy or train the tokenizer again"
LARGEST = 256 << 20  # bytes; those with the most entries have 35 MB
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def check_files(folder: Path) -> None:
    """Raise UserError, naming file and field, for what a library would only stumble over.

    Also if there is neither a tokenizer.json nor a vocabulary that it can be made of.
    """
    if not (folder / TOKENIZER).is_file() and not other_vocabularies(folder):
        raise UserError(
            f"{folder}: no tokenizer there (no {TOKENIZER})",
            "an adapter saved without one uses its base's: name that"
            if (folder / "adapter_config.json").is_file()
            else "make one with `llmctl tokenizer train DATA --out DIR`",
        )
    read = {
        name: _read_json(folder / name)
        for name in (TOKENIZER, CONFIG, SPECIAL, ADDED)
        if (folder / name).is_file()
    }
    for template in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        try:
            template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{template}: not UTF-8 (byte {error.start})", "save the file as UTF-8") from None
    for name, value in read.get(ADDED, {}).items():
        _require(type(value) is int, folder / ADDED, name, value, "an id")
    for file in (CONFIG, SPECIAL):
        for field, value in read.get(file, {}).items():
            if field in FIELDS:
                allowed, what = FIELDS[field]
                # only the one file says of an object that it is a token
                _require(allowed(value, file == SPECIAL), folder / file, field, value, what)


def other_vocabularies(folder: Path) -> list[str]:
    """The vocabularies of other formats in a folder."""
    found = [name for name in OTHERS if (folder / name).is_file()]
    return found + sorted(file.name for pattern in OTHER_PATTERNS for file in folder.glob(pattern))


def has_own_code(folder: Path) -> bool:
    """Whether `tokenizer_config.json` names code of the tokenizer's own."""
    return (folder / CONFIG).is_file() and bool(_read_json(folder / CONFIG).get("auto_map"))


def _require(fits: bool, file: Path, field: str, value: Any, what: str) -> None:
    if not fits:
        shown = json.dumps(value, ensure_ascii=False)
        raise UserError(
            f"{file}: {field}: {shown[:60]}{'…' if len(shown) > 60 else ''} is not {what}", DAMAGED
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = read_bounded(file, LARGEST)
        value = json.loads(raw)
    except PermissionError:
        raise UserError(f"{file}: no permission to read", "ask its owner, or copy the folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON", DAMAGED) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start})", DAMAGED) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {json_fault(error)}", DAMAGED) from None
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({(error.strerror or str(error)).lower()})", DAMAGED
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object", DAMAGED)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{file}: begins with a byte order mark", "save it as UTF-8 without one")
    return value


def _token(value: Any, plain: bool) -> bool:
    """A token: its text, or an object, which says what it is unless it is `plain`."""
    if isinstance(value, dict):
        return isinstance(value.get("content"), str) and (plain or value.get("__type") == "AddedToken")
    return isinstance(value, str)


def _token_or_none(value: Any, plain: bool) -> bool:
    return value is None or _token(value, plain)


def _tokens(value: Any, plain: bool) -> bool:
    listed = list(value.values()) if isinstance(value, dict) else value
    return value is None or (isinstance(listed, list) and all(_token(one, plain) for one in listed))


def _by_id(value: Any, _: bool) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for key, token in value.items()
    )


def _templates(value: Any, _: bool) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(one, dict)
            and isinstance(one.get("name"), str)
            and isinstance(one.get("template"), str)
            for one in value
        )
    named = value if isinstance(value, dict) else {"default": value}
    return value is None or all(isinstance(text, str) for text in named.values())


def _text_or_none(value: Any, _: bool) -> bool:
    return value is None or isinstance(value, str)


def _side(value: Any, _: bool) -> bool:
    return value in ("left", "right")


def _number_or_none(value: Any, _: bool) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


# field -> whether a value will do, and what it should be
FIELDS: dict[str, tuple[Callable[[Any, bool], bool], str]] = {
    **dict.fromkeys(NAMED, (_token_or_none, "a token: its text, or an object with __type AddedToken")),
    "additional_special_tokens": (_tokens, "a list of tokens"),
    "extra_special_tokens": (_tokens, "a list of tokens, or tokens by name"),
    "added_tokens_decoder": (_by_id, "tokens by their ids"),
    "chat_template": (_templates, "a template, or a list of named ones"),
    "tokenizer_class": (_text_or_none, "the name of a class"),
    "padding_side": (_side, "left or right"),
    "truncation_side": (_side, "left or right"),
    "model_max_length": (_number_or_none, "a number"),
}
