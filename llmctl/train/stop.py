"""Ctrl-C and SIGTERM: the step under way is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmctl.errors import Interrupted
from llmctl.signals import told_of_requests


@contextmanager
def signals(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP set `stop`; a second Ctrl-C stops at once."""

    def ask(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    with told_of_requests(ask):
        yield


def interrupted(run: Path, step: int, steps: int) -> Interrupted:
    """The error to raise once the state is saved."""
    return Interrupted(
        f"{run}: interrupted at step {step} of {steps}; the state was saved",
        "run the same command with --resume to go on",
    )
