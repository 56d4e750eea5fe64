"""The errors a user may meet, and the exit codes a program may read.

`ValueError` and `assert` are for programmers; `UserError` is for people. Only `cli/boundary.py`
turns a `UserError` into words on a terminal.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_USAGE = 2
EXIT_CHECK_FAILED = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend.

    Args:
        message: what is wrong, in lower case, without a final period, naming the file or field.
        hint: what to do about it; one line.

    `exit_code` is 1 unless a subclass says otherwise.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UserError):
    """The command line itself is wrong (exit 2)."""

    exit_code = EXIT_USAGE


class CheckFailed(UserError):
    """The work ran, and a check on its result failed: divergence, lost parity (exit 3)."""

    exit_code = EXIT_CHECK_FAILED


class Interrupted(UserError):
    """The user pressed Ctrl-C; the state was saved first (exit 130)."""

    exit_code = EXIT_INTERRUPTED


def nearest(name: str, known: list[str]) -> str | None:
    """The known name closest to `name` by edit similarity, or None if nothing is close."""
    import difflib

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def one_of(names: list[str]) -> str:
    """A list of names as the messages print it: `a`, `b`, `c`."""
    return ", ".join(f"`{name}`" for name in names)
