"""The shapes an example may have, whatever format its record is written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmctl.data.turns import Message, encodable, is_text, tools_encodable

Tools = list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, of which those of the assistant are answers. At least one is, and none of them is empty."""

    messages: list[Message]
    tools: Tools = None

    def encodable(self) -> bool:
        return encodable(self.messages) and tools_encodable(self.tools)


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text without a template: the prompt, and what is to follow it."""

    prompt: str
    completion: str

    def encodable(self) -> bool:
        return is_text(self.prompt) and is_text(self.completion)


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text, all of it to be learned."""

    text: str

    def encodable(self) -> bool:
        return is_text(self.text)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two ways to go on after a prompt that does not end with an assistant turn.

    Each begins and ends with an assistant turn; mostly that is one turn.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: Tools = None

    def encodable(self) -> bool:
        return encodable(self.prompt + self.chosen + self.rejected) and tools_encodable(self.tools)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A way to go on that is wanted (`label` True) or not; as in `Preference`."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: Tools = None

    def encodable(self) -> bool:
        return encodable(self.prompt + self.completion) and tools_encodable(self.tools)


Shape = Conversation | Completion | Text | Preference | Labelled
