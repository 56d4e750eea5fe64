"""How `llmctl quickstart --model M --data FILE` ends: the table and its receipts, an exchange or a chat, a refusal."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import llmctl.stages as stages
from llmctl.cli import own as shown
from tests.program import Program

EMPTY = dict.fromkeys(
    ("loss", "exact_match", "asked", "stop_rate", "preference_accuracy", "preference_accuracy_low")
)
SHARES = {"exact_match": 0.5, "exact_match_low": 0.4, "exact_match_high": 0.6}
KEPT = {"preference_accuracy": 0.9, "preference_accuracy_low": 0.8, "preference_accuracy_high": 0.95}
BEFORE = (
    EMPTY
    | SHARES
    | {"stage": "base", "seconds": 0.0, "size_bytes": 1 << 28, "loss": 2.5, "asked": 12, "stop_rate": 0.5}
)
RESULT: dict[str, Any] = {
    "rows": [
        BEFORE,
        BEFORE
        | KEPT
        | {"stage": "dpo", "seconds": 61.26, "size_bytes": 5 << 20, "loss": 0.25, "stop_rate": 1.0},
    ],
    "receipts": {
        "merge": {"of": "dpo", "effect": 0.512, "kl": 2.2e-5, "allowed_kl": 1e-4},
        "int8": {
            "size_bytes_before": 1 << 28,
            "size_bytes": 180 << 20,
            "top1": 0.981,
            "kl": 0.0021,
            "tokens_per_second_before": 21.4,
            "tokens_per_second": 45.0,
        },
    },
    "refused": {},
    "seconds": 600.0,
    "peak_memory_bytes": 3 << 30,
    "model": "runs/m-quickstart/int8",
    "exchange": {"prompt": "2 + 2?", "before": "It\nis 5.", "answer": "4", "expected": "4"},
    "commands": {"int8": "llmctl quantize a --out b"},
}
TABLE = [
    "model  time    size     loss   exact match  stops  preferred",
    "base   -       256 MiB  2.500  50.0% ±10.0  6/12   -",
    "dpo    61.3 s  5.0 MiB  0.250  50.0% ±10.0  12/12  90.0% ±7.5",
    "",
    *shown.NOTES,
    "",
    "merge  differs from dpo by 2.2e-05 nats a token (allowed 0.0001)",
    "dpo    moves its base by 0.51 nats a token",
    "int8   256 MiB -> 180 MiB, KL 0.0021, same next token 98.1%, 21 -> 45 tokens/s",
    "",
    "10:00 in all, 3.0 GiB of memory at most; the model: runs/m-quickstart/int8",
    "",
]
WORDS = (
    "quickstart",
    "--model",
    "m",
    "--data",
    "a",
    "--data",
    "b",
    "--seed",
    "3",
    "--columns",
    "prompt=q,response=a",
)


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stage was asked for; it ends with a copy of `RESULT`."""
    asked: list[Any] = []

    def run(wish: Any, show: Any, talk: Any, dry_run: bool) -> dict[str, Any]:
        asked.append((wish, dry_run))
        return RESULT

    module = types.SimpleNamespace(
        run=run, Wish=lambda **words: types.SimpleNamespace(**{"seed": None, "device": None} | words)
    )
    monkeypatch.setattr(stages, "own", module, raising=False)
    monkeypatch.setattr(
        stages, "quickstart", types.SimpleNamespace(conversation=lambda *words: words), raising=False
    )
    return asked


def test_away_from_a_terminal_one_exchange(llmctl_: Program, wishes: list[Any]) -> None:
    ended = llmctl_(*WORDS)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [*TABLE, "> 2 + 2?", "before  It is 5.", "now     4", "right   4"]
    (wish, dry_run) = wishes[0]
    assert (wish.model, wish.data, wish.seed, dry_run) == ("m", ["a", "b"], 3, False)
    assert wish.columns == {"prompt": "q", "response": "a"}


def test_without_pairs_nothing_is_said_of_them(
    llmctl_: Program, wishes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RESULT, "rows", [BEFORE])
    out = llmctl_(*WORDS).out
    assert out.splitlines()[0].split()[-1] == "stops" and "preferred" not in out
    assert all(note in out for note in shown.NOTES[:-1])


def test_the_table_is_not_wide() -> None:
    assert max(len(line) for line in TABLE) <= 82


def test_on_a_terminal_a_chat(llmctl_: Program, wishes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []
    monkeypatch.setattr(shown, "converse", met.append)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert llmctl_(*WORDS).out.splitlines()[-1] == "Ask it, for example: 2 + 2?"
    assert met == [("runs/m-quickstart/int8", 3, None)]


def test_a_refusal_is_the_exit_code(
    llmctl_: Program, wishes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RESULT, "refused", {"int8": "divergence 3"})
    ended = llmctl_(*WORDS)
    assert ended.code == 3 and "int8   refused: divergence 3" in ended.out.splitlines()
    assert ended.err.splitlines()[-2:] == [
        "error: int8 was refused by its own check; what is good is runs/m-quickstart/int8",
        "hint: if the difference is acceptable: llmctl quantize a --out b --accept; then run this again",
    ]
    assert llmctl_(*WORDS, "--json").code == 3


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--seed -1", "command line: train.seed: should be greater than or equal to 0, not -1"),
        ("--columns prompt", "command line: data.columns: `prompt` is not of the form ROLE=COLUMN"),
        ("--minutes nan", "--minutes: nan is no time to train"),
        ("--minutes soon", "--minutes: `soon` is not a number"),
    ],
)
def test_wrong_options(words: str, error: str, llmctl_: Program, wishes: list[Any]) -> None:
    ended = llmctl_("quickstart", "--model", "m", "--data", "a", *words.split())
    assert ended.code in (1, 2) and f"error: {error}" in ended.err.splitlines(), ended.err
    assert not wishes
