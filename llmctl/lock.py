"""At most one live process per run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from llmctl.errors import UserError
from llmctl.files import disk_errors, write_atomic
from llmctl.reading import read_value

LOCK = "run.lock"


class Lock:
    """At most one live process per run folder, across hosts as far as the file system allows."""

    def __init__(self, path: Path) -> None:
        self.file = path / LOCK
        self.held = False

    def acquire(self) -> None:
        """Take the lock; a lock whose process is gone is taken over. Raises UserError if it lives."""
        mine = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
        )
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # looking at the old lock and writing the new one is one step for all processes of this host
            with _alone_in(self.file.parent):
                self._refuse_if_alive()
                write_atomic(self.file, mine)
        self.held = True

    def release(self) -> None:
        """Give the lock back; does nothing if it was never taken."""
        if self.held:
            self.file.unlink(missing_ok=True)
            self.held = False

    def holder(self) -> tuple[int, str] | None:
        """Process and host that hold the lock; None if it is free or its process is gone.

        A process on another host cannot be looked up, so it counts as alive.
        """
        try:
            owner = read_value(self.file)
            pid, host, started = int(owner["pid"]), str(owner["host"]), owner["started"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # no lock, or its process was killed between creating and writing it
        if host != socket.gethostname():
            return pid, host
        return (pid, host) if started is not None and _started(pid) == started else None

    def _refuse_if_alive(self) -> None:
        holder = self.holder()
        if holder is None:
            return
        pid, host = holder
        if host != socket.gethostname():
            raise UserError(
                f"{self.file.parent}: the run is locked by process {pid} on {host}",
                f"if that process is gone, delete {self.file}",
            )
        raise UserError(
            f"{self.file.parent}: the run is in use by process {pid}",
            "wait for it, or stop it, then run the same command again",
        )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # gives the flock back


def _started(pid: int) -> float | None:
    """When a process began (seconds since the epoch), so that a reused pid is not mistaken for it."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
