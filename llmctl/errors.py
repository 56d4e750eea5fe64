"""The errors a user may meet, and the exit codes a program may read.

`ValueError` and `assert` are for programmers; `UserError` is for people. Only `cli/boundary.py`
turns a `UserError` into words on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def named_in(section: str, names: dict[str, str] | None = None) -> Iterator[None]:
    """What readers and encoders say of the `data` section, in the words of a command that has none.

    Args:
        section: the section that holds `text_field` and `max_length` there.
        names: further replacements.
    """
    try:
        yield
    except UserError as error:
        table = {f"data.{field}": f"{section}.{field}" for field in ("text_field", "max_length", "columns")}
        table |= dict.fromkeys(TEMPLATE_FLAG, OTHER_TEMPLATE) | (names or {})
        for words, ours in sorted(table.items(), key=lambda pair: -len(pair[0])):
            error.message = error.message.replace(words, ours)
            error.hint = error.hint.replace(words, ours) if error.hint else None
        raise


# how the stages that train are told of another template, and what there is to do where a model is used as it is
TEMPLATE_FLAG = (
    "choose another template with --template, as --template chatml",
    "choose another template with --template",
    "choose another one with --template",
    "choose another with --template",
)
OTHER_TEMPLATE = "put another chat template beside its tokenizer"


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
