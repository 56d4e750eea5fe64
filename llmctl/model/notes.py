"""What must be said of a model's files below the stages, which have a `Talk`."""

from __future__ import annotations

import logging
from functools import cache

LOG = logging.getLogger("llmctl")  # without a handler of the program's own, Python writes the line to stderr


@cache
def say_once(text: str) -> None:
    """Log a warning, the same text only once in a process: models are opened several times in a command."""
    LOG.warning(text)
