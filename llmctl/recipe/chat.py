"""The recipe of a conversation."""

from __future__ import annotations

from typing import Literal

from llmctl.recipe.base import StageRecipe, about
from llmctl.recipe.generate import SamplingSection
from llmctl.recipe.ranges import MOST_TEMPERATURE, MOST_TOKENS
from llmctl.recipe.train import Device


class ChatSection(SamplingSection):
    """`chat.*`: what `generate.*` has, and what belongs to a conversation."""

    max_new_tokens: int = about("chat.max_new_tokens", 512, ge=1, le=MOST_TOKENS)
    temperature: float = about("chat.temperature", 0.7, ge=0, le=MOST_TEMPERATURE)
    system: str | None = about("chat.system", None)
    history: bool = about("chat.history", True)


class ChatRecipe(StageRecipe):
    """`llmctl chat MODEL`."""

    stage: Literal["chat"] = about("stage", "chat")
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    chat: ChatSection = about("chat", ChatSection())
