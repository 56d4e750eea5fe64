"""What a run of the program inside a test gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Program = Callable[..., Outcome]
