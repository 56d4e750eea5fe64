"""How `llmctl quickstart` ends: the table, one exchange or a chat, JSON."""

from __future__ import annotations

import json
import sys

import pytest

from llmctl.cli import quickstart
from tests.cli.fake_stages import Calls
from tests.program import Program

TABLE = [
    "stage      time    size     loss   exact match  change     preferred",
    "tokenizer  1.2 s   39 KiB   -      -            -          -",
    "dpo        35.0 s  3.0 MiB  0.250  90.0% ±1.5   -0.4 ±0.8  95.1% ±1.0",
    "",
    *quickstart.NOTES,
    "",
    "1:01 in all, 1.0 GiB of memory at most; the model: runs/o",
    "",
]


def test_away_from_a_terminal_one_exchange(llmctl_: Program, calls: Calls) -> None:
    ended = llmctl_("quickstart", "--seed", "3", "--out", "o", "--device", "cpu")
    assert calls.words == {"out": "o", "seed": 3, "device": "cpu"}
    assert ended.out.splitlines() == [*TABLE, "> Who?", "Ada."]
    assert max(len(line) for line in TABLE) <= 80


def test_on_a_terminal_a_chat(llmctl_: Program, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[object] = []
    monkeypatch.setattr(quickstart, "converse", met.append)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    ended = llmctl_("quickstart", "--seed", "3")
    assert ended.out.splitlines() == [*TABLE, "Ask it about one of its people, for example: Who?"]
    assert met == [("runs/o", 3, None)]
    assert "rows" in json.loads(llmctl_("quickstart", "--json").out) and len(met) == 1


def test_json(llmctl_: Program, calls: Calls) -> None:
    found = json.loads(llmctl_("quickstart", "--json").out)
    assert list(found) == ["rows", "seconds", "peak_memory_bytes", "model", "exchange"]
    assert found["rows"][1]["change_low"] == -0.012
