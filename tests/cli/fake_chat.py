"""A conversation without a model, for tests of what stands around it; run as a program, `llmctl` with it.

It answers `you said: …`; to a turn of the form `count N` it counts so far, a number every twentieth of a second.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import UserError

CONTEXT = 4096


@dataclass(frozen=True)
class Exchange:
    """As `llmctl.stages.chat.Exchange`, which would import torch."""

    prompt: str
    text: str
    ended: str
    prompt_tokens: int
    new_tokens: int
    context: int
    tokens_per_second: float

    @property
    def kept(self) -> bool:
        return self.ended != "interrupted" or bool(self.text.strip())


class Chat:
    """As `llmctl.stages.chat.Chat`."""

    summary = "a fake"

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.turns: list[dict[str, str]] = []
        self.saved: list[tuple[str, bool]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        system = self.settings.system
        return ([{"role": "system", "content": system}] if system else []) + self.turns

    def tell(self, system: str | None) -> None:
        if system == "refuse":
            raise UserError("a system prompt cannot be given", "say it in the first turn")
        self.settings = self.settings.model_copy(update={"system": system})

    def forget(self) -> None:
        self.turns = []

    def save(self, path: Path, overwrite: bool = False) -> None:
        self.saved.append((str(path), overwrite))

    def ask(self, text: str, on_text: Callable[[str], None], stopped: Callable[[], bool]) -> Exchange:
        if text == "too long":
            raise UserError("the prompt has 9,000 tokens, but the model's context is 4,096", "/reset helps")
        found, ended = "", "stop"
        for bit in _bits(text):
            on_text(bit)
            found += bit
            if stopped():
                ended = "interrupted"
                break
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": found}]
        return Exchange(text, found, ended, 1000, 24, CONTEXT, 12.34)


def _bits(text: str) -> list[str] | Any:
    word, _, number = text.partition(" ")
    if word != "count":
        return ["you ", "said: ", f"**{text}**"]
    return _counting(int(number))


def _counting(last: int) -> Any:
    for number in range(last):
        time.sleep(0.05)
        yield f"{number}\n"


def fake_stage(opened: list[Chat] | None = None) -> types.SimpleNamespace:
    """What takes the place of the stage; the conversations it opens are put into `opened`."""

    def begin(recipe: Any, talk: Any) -> Chat:
        if recipe.base == "missing":
            raise UserError("missing: not found here or on the hub", "see `llmctl runs list`")
        if recipe.base == "plain":
            talk.say("plain has no chat template")
        found = Chat(recipe.chat)
        if opened is not None:
            opened.append(found)
        return found

    return types.SimpleNamespace(begin=begin)


if __name__ == "__main__":
    import llmctl.stages
    from llmctl.cli.main import main

    llmctl.stages.chat = fake_stage()  # type: ignore[attr-defined]
    main(sys.argv[1:])
