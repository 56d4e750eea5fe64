"""Requests to end the program: Ctrl-C (SIGINT), SIGTERM, and SIGHUP of a terminal that was closed.

`cli/boundary.py` turns them into a KeyboardInterrupt for every command; a training loop asks to be told instead,
so that the step under way is finished and saved.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# `timeout` and some supervisors send a signal to the process and to its group: that is one request
ONE_REQUEST = 0.5  # seconds

_received: list[int] = []  # signals that were answered with a KeyboardInterrupt


@contextmanager
def told_of_requests(tell: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call `tell` with the signal of each request. Does nothing outside the main thread.

    SIGHUP and SIGTERM that the caller had ignored (`nohup`) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -ONE_REQUEST

    def receive(number: int, frame: object) -> None:
        nonlocal last
        now, before = time.monotonic(), last
        last = now
        if now - before >= ONE_REQUEST:
            tell(number)

    before = {}
    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, every request raises KeyboardInterrupt in the main thread."""
    _received.clear()

    def interrupt(number: int) -> None:
        _received.append(number)
        raise KeyboardInterrupt

    try:
        with told_of_requests(interrupt):
            yield
    finally:
        _received.clear()


def was_interrupted() -> bool:
    """Whether a request raised KeyboardInterrupt in this command.

    A library that is interrupted while it is imported or called back makes another error of it, so the kind of an
    error does not tell.
    """
    return bool(_received)
