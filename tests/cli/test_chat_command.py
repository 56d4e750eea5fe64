"""`llmctl chat` through a pipe, and its commands: what goes where, and how it ends. The stage is a fake."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

import llmctl.stages as stages
from llmctl.cli.chat import meter
from tests.cli.fake_chat import Chat, Exchange, fake_stage
from tests.program import Outcome, Program

METER = "1,024 of 4,096 tokens · 12.3 tokens/s\n"
Piped = Callable[..., Outcome]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Chat]:
    """The conversations that were begun."""
    found: list[Chat] = []
    monkeypatch.setattr(stages, "chat", fake_stage(found), raising=False)
    return found


@pytest.fixture
def piped(llmctl_: Program, opened: list[Chat], monkeypatch: pytest.MonkeyPatch) -> Piped:
    """`echo TEXT | llmctl chat MODEL WORDS…`"""

    def run(text: str | bytes, *words: str) -> Outcome:
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return llmctl_("chat", *(words or ("model",)))

    return run


def test_answers_go_to_stdout_and_talk_to_stderr(piped: Piped, opened: list[Chat]) -> None:
    outcome = piped("one\n\n你好\n", "plain")
    assert outcome.code == 0
    assert outcome.out == "you said: **one**\nyou said: **你好**\n"
    assert outcome.err == "plain has no chat template\n" + 2 * METER
    assert len(opened) == 1 and len(opened[0].turns) == 4


def test_json_is_a_line_an_exchange(piped: Piped) -> None:
    outcome = piped("one\n你好\n", "model", "--json")
    assert outcome.code == 0 and outcome.err == 2 * METER
    first, second = map(json.loads, outcome.out.splitlines())
    assert first == {
        "prompt": "one",
        "text": "you said: **one**",
        "ended": "stop",
        "prompt_tokens": 1000,
        "new_tokens": 24,
        "context": 4096,
        "tokens_per_second": 12.34,
    }
    assert second["prompt"] == "你好" and "你好" in outcome.out


@pytest.mark.parametrize("text", ["", "\n\n  \n", "/exit\none\n", "/quit\n"])
def test_an_end_without_a_word_is_fine(text: str, piped: Piped) -> None:
    assert piped(text) == Outcome(0, "", "")


def test_the_first_error_ends_a_piped_conversation(piped: Piped) -> None:
    outcome = piped("one\ntoo long\nthree\n")
    assert outcome.code == 1 and outcome.out == "you said: **one**\n"
    assert outcome.err == (
        f"{METER}error: the prompt has 9,000 tokens, but the model's context is 4,096\nhint: /reset helps\n"
    )
    assert piped("/hlep\n").code == 1
    assert piped(b"\xff\n").err.startswith("error: stdin: line 1 is not UTF-8 text (byte 1)\n")


def test_flags_and_fields_reach_the_recipe(piped: Piped, opened: list[Chat]) -> None:
    flags = ["--system", "Be brief.", "--temperature", "0", "--top-k", "5", "--top-p", "0.5", "--seed", "7"]
    assert piped("x\n", "model", *flags, "--max-new-tokens", "9", "chat.ignore_eos=true").code == 0
    assert opened[0].settings.model_dump() == {
        "system": "Be brief.",
        "temperature": 0.0,
        "top_k": 5,
        "top_p": 0.5,
        "seed": 7,
        "max_new_tokens": 9,
        "ignore_eos": True,
        "history": True,
        "dtype": "auto",
        "threads": "auto",
    }


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["--seed", "1"], 2, "missing argument MODEL"),
        (["model", "Hello?"], 2, "unexpected argument: Hello?"),
        (["missing"], 1, "missing: not found here or on the hub"),
        (["model", "chat.temprature=1"], 1, "command line: chat.temprature: unknown key"),
        (["model", "--temperature", "-1"], 1, "command line: chat.temperature: should be greater than"),
        (["model", "--temperature", "hot"], 2, "--temperature: `hot` is not a number"),
    ],
)
def test_a_wrong_command_line(words: list[str], code: int, error: str, piped: Piped) -> None:
    outcome = piped("x\n", *words)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(f"error: {error}") and "\nhint: " in outcome.err


# --- commands ----------------------------------------------------------------------------------------


def test_help_names_every_command(piped: Piped) -> None:
    outcome = piped("/help\n/?\n")
    assert outcome.out == "" and outcome.code == 0
    for word in ("/help", "/reset", "/system [TEXT]", "/save FILE", "/save! FILE", "/params", "/exit"):
        assert outcome.err.count(f"{word} ") == 2
    assert max(map(len, outcome.err.splitlines())) < 80


def test_reset_and_system(piped: Piped, opened: list[Chat]) -> None:
    outcome = piped("/system\none\n/system Be kind.\n/system\n/new\n/reset\n/system -\n/reset\n")
    assert outcome.err == (
        f"there is no system prompt\n{METER}system prompt: Be kind.\nsystem prompt: Be kind.\n"
        "a new conversation begins; the system prompt stays\n"
        "a new conversation begins; the system prompt stays\n"
        "there is no system prompt\na new conversation begins\n"
    )
    assert opened[0].messages == []


def test_save(piped: Piped, opened: list[Chat], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    outcome = piped("one\n/save my talk.json\n/save! ~/talk.jsonl\n")
    assert opened[0].saved == [("my talk.json", False), ("/home/ada/talk.jsonl", True)]
    assert outcome.err == f"{METER}my talk.json: 2 messages\n/home/ada/talk.jsonl: 2 messages\n"


def test_params(piped: Piped, opened: list[Chat]) -> None:
    outcome = piped("/params\n/params top_k 40 temperature=0\n/params top_k none  seed = 3\n")
    assert outcome.err.splitlines() == [
        "temperature     0.7",
        "top_k           none",
        "top_p           1",
        "seed            0",
        "max_new_tokens  512",
        "history         yes",
        "temperature     0",
        "top_k           40",
        "top_k           none",
        "seed            3",
    ]
    settings = opened[0].settings
    assert (settings.temperature, settings.top_k, settings.seed) == (0.0, None, 3)


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("/hlep", "`/hlep` is not a command", "the nearest is `/help`, and `//hlep` says it to the model"),
        ("/zzz", "`/zzz` is not a command", "/help lists the commands, and `//zzz` says it to the model"),
        ("/", "`/` is not a command", "/help lists the commands, and `//` says it to the model"),
        ("/reset now", "/reset takes nothing after it, but got `now`", None),
        ("/exit now", "/exit takes nothing after it, but got `now`", None),
        ("/save", "/save needs the name of a file", "/save talk.json"),
        ("/save!", "/save! needs the name of a file", "/save! talk.json"),
        ("/system refuse", "a system prompt cannot be given", "say it in the first turn"),
        (
            "/params temprature 1",
            "`temprature` is not one of `temperature`, `top_k`, `top_p`, `seed`, `max_new_tokens`, `history`",
            "did you mean `temperature`?",
        ),
        (
            "/params dtype float32",
            "`dtype` is not one of `temperature`, `top_k`, `top_p`, `seed`, `max_new_tokens`, `history`",
            "/params alone shows them",
        ),
        ("/params top_k", "`top_k` has no value", "/params top_k VALUE"),
        (
            "/params top_p 2",
            "top_p: should be less than or equal to 1, not 2",
            "`llmctl recipe show chat` explains chat.top_p",
        ),
        (
            "/params seed x",
            "seed: should be a valid integer, not the text `x`",
            "`llmctl recipe show chat` explains chat.seed",
        ),
        (
            "/params history off",
            "history: should be a valid boolean, not the text `off`",
            "write true or false",
        ),
        (
            "/params temperature none",
            "temperature: should be a valid number, not nothing",
            "`llmctl recipe show chat` explains chat.temperature",
        ),
    ],
)
def test_a_wrong_command(line: str, error: str, hint: str | None, piped: Piped, opened: list[Chat]) -> None:
    outcome = piped(f"{line}\n")
    assert outcome.err == f"error: {error}\n" + (f"hint: {hint}\n" if hint else "")
    assert outcome.code == 1 and opened[0].settings.temperature == 0.7 and not opened[0].turns


@pytest.mark.parametrize(
    ("ended", "text", "said"),
    [
        ("stop", "a", ""),
        ("length", "a", " · cut at max_new_tokens"),
        ("context", "a", " · the context is full; /reset begins a new conversation"),
        ("interrupted", "a", " · stopped"),
        ("interrupted", " ", " · stopped before the first word; the turn is taken back"),
    ],
)
def test_the_meter_says_how_it_ended(ended: Any, text: str, said: str) -> None:
    assert meter(Exchange("?", text, ended, 1000, 24, 4096, 12.34)) + "\n" == METER[:-1] + said + "\n"
