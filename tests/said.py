"""A talk that remembers what it was told."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from llmctl.talk import SILENT, Bar


class Said:
    """Keeps the lines; its bars show nothing."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def bar(self, *about: Any) -> AbstractContextManager[Bar]:
        return SILENT.bar(*about)
