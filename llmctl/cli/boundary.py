"""The one place where errors become words on a terminal and exit codes.

    error: recipes/sft.yaml: model.norm: `rmsnrom` is not one of `layernorm`, `rmsnorm`
    hint: did you mean `rmsnorm`?

`LLMCTL_DEBUG=1` shows the traceback as well. Anything that is not a `UserError` or a wrong command
line is a bug of ours and says so.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

import typer

from llmctl.cli.options import other_name
from llmctl.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USER_ERROR,
    Interrupted,
    UsageError,
    UserError,
    nearest,
)

DEBUG = "LLMCTL_DEBUG"


def guard(action: Callable[[], object], args: list[str], command: str) -> int:
    """Run a command line and return its exit code; every error is told on stderr in one or two lines.

    Args:
        action: parses `args` and runs the command; may return an exit code.
        args: the words after `llmctl`, for messages about the command line itself.
        command: the command they name, such as `llmctl runs show`, for the hint to see its help.
    """
    try:
        result = action()
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _show_traceback()
            report(UserError(f"{str(error.filename)[:40]}…: no file can have so long a name", "name another"))
            return EXIT_USER_ERROR
        if error.errno != errno.ENOSPC or error.filename is not None:
            return _bug(error)
        # what stages write is told by files.py; this was stdout
        _tell("error: the disk is full, so the result could not be written")
        _tell("hint: free some space, or send stdout elsewhere")
        return _reader_left()
    except UserError as error:
        _show_traceback()
        report(error)
        return error.exit_code
    except typer.TyperException as error:
        _show_traceback()
        told = usage_error(error, args, command)
        report(told)
        return told.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = EXIT_INTERRUPTED
    except Exception as error:
        return _bug(error)
    # Typer turns a Ctrl-C that nobody caught into this code, without a word
    if result == EXIT_INTERRUPTED:
        _tell("interrupted")
    return result if isinstance(result, int) else EXIT_OK


def _bug(error: Exception) -> int:
    _show_traceback()
    _tell(f"internal error: {type(error).__name__}: {error}: this is a bug in llmctl")
    _tell(f"hint: run it again with {DEBUG}=1 to see the traceback, and report that")
    return EXIT_USER_ERROR


def report(error: UserError) -> None:
    """Write a user error to stderr: one line, and one more for the hint."""
    # an interruption was asked for: its message says what happened, and nothing is wrong
    _tell(error.message if isinstance(error, Interrupted) else f"error: {error.message}")
    if error.hint:
        _tell(f"hint: {error.hint}")


def _tell(text: str) -> None:
    """One line on stderr; what a file name or a library's text may contain cannot break it."""
    line = " ".join(text.splitlines())
    print("".join(c if c.isprintable() else _escaped(c) for c in line), file=sys.stderr)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def _show_traceback() -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc(file=sys.stderr)


def _reader_left() -> int:
    """The reader of stdout went away (`llmctl … | head`): leave without a word.

    What is still buffered has nowhere to go, and Python would complain about it at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_USER_ERROR


def _unknown_option(match: re.Match[str], args: list[str]) -> tuple[str, str | None]:
    name, suggested = match[1], re.findall(r"--?[\w-]+", match[2] or "")
    if hint := other_name(name, args):
        return f"no such option: {name}", hint
    close = nearest(name, [option for option in suggested if option != "--help" or name.startswith("--h")])
    return f"no such option: {name}", f"did you mean `{close}`?" if close else None


def _unknown_command(match: re.Match[str], args: list[str]) -> tuple[str, str | None]:
    suggested = re.findall(r"'([^']+)'", match[2])
    return f"no such command: {match[1]}", f"did you mean `{suggested[0]}`?" if suggested else None


def _bad_value(match: re.Match[str], args: list[str]) -> tuple[str, str | None]:
    name, problem = match[1], match[2]
    kind = next((word for key, word in _KINDS.items() if key in problem), None)
    if kind is None:
        return f"{name}: {problem[0].lower()}{problem[1:]}", None
    return f"{name}: `{_given(name, args)}` is not {kind}", None


def _given(flag: str, args: list[str]) -> str:
    """The value written after a flag."""
    for index, word in enumerate(args):
        if word == flag and index + 1 < len(args):
            return args[index + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return ""


_KINDS = {"valid integer": "a whole number", "valid number": "a number"}

# Typer says what is wrong with a command line in sentences of its own; these are ours for them.
_SAID: list[tuple[str, Callable[[re.Match[str], list[str]], tuple[str, str | None]]]] = [
    (r"No such option: (\S+)(.*)", _unknown_option),
    (r"No such command '(.*?)'\.(.*)", _unknown_command),
    (r"Invalid value for '(.*?)': (.*)", _bad_value),
    (r"Missing argument '(.*?)'", lambda match, _: (f"missing argument {match[1]}", None)),
    (r"Missing option '(.*?)'", lambda match, _: (f"missing option {match[1]}", None)),
    (r"Option '(.*?)' requires an argument", lambda match, _: (f"{match[1]} needs a value", None)),
    (r"Option '(.*?)' does not take a value", lambda match, _: (f"{match[1]} takes no value", None)),
    (
        r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)",
        lambda match, _: (f"unexpected argument: {match[1]}", None),
    ),
]


def usage_error(error: typer.TyperException, args: list[str], command: str) -> UsageError:
    """What Typer found wrong with a command line, in our words and with a hint."""
    said = error.format_message()
    message, hint = said[:1].lower() + said[1:].rstrip("."), None
    for pattern, rewrite in _SAID:
        if match := re.match(pattern, said, re.DOTALL):
            message, hint = rewrite(match, args)
            break
    return UsageError(message, hint or f"see `{command} --help`")
