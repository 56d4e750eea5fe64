"""Ctrl-C and SIGTERM: the step under way is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmctl.errors import Interrupted


@contextmanager
def signals(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set `stop`; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(run: Path, step: int, steps: int) -> Interrupted:
    """The error to raise once the state is saved."""
    return Interrupted(
        f"{run}: interrupted at step {step} of {steps}; the state was saved",
        "run the same command with --resume to go on",
    )
