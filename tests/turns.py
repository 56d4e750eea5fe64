"""Makers of messages and files of records, and a reader that checks the account, for tests of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.data.document import Account
from llmctl.data.formats import Example, examples
from llmctl.errors import UserError


def read(
    path: object, text_field: str = "text", columns: dict[str, str] | None = None
) -> tuple[list[Example], Account]:
    account = Account(noun="record")
    found = list(examples([str(path)], text_field, account, columns=columns))
    assert account.read == account.kept + sum(account.counts.values())
    assert account.kept == len(found)
    return found, account


def write(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def error(path: object, text_field: str = "text", columns: dict[str, str] | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, text_field, columns)
    raised = caught.value
    assert raised.hint and "\n" not in raised.message + raised.hint
    assert raised.message[-1] != "."
    return raised


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}
