"""What is said of a model's files: below the stages, which have a `Talk`, and of fields that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

LOG = logging.getLogger("llmctl")  # without a handler of the program's own, Python writes the line to stderr


@cache
def say_once(text: str) -> None:
    """Log a warning, the same text only once in a process: models are opened several times in a command."""
    LOG.warning(text)


def culprit(
    fields: Mapping[str, Any], build: Callable[[dict[str, Any]], Any], faults: tuple[type[Exception], ...]
) -> str | None:
    """The first field without which `build` takes the others without one of `faults`; None if there is no such field."""
    for name in fields:
        try:
            build({key: value for key, value in fields.items() if key != name})
        except faults:
            continue
        return name
    return None
