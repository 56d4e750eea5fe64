"""What the user says in a conversation, from a terminal or a pipe, one turn at a time.

a line                      is a turn
a line that ends in \\       goes on in the next line
\"\"\" … \"\"\"                   encloses several lines, which are taken as they are
/word                       is a command, and //word says /word
"""

from __future__ import annotations

import codecs
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from llmctl.errors import UserError

QUOTES = '"""'
PROMPT, MORE = "> ", "… "
NOT_UTF8 = "convert it to UTF-8"


@dataclass(frozen=True)
class Turn:
    """What was said.

    Args:
        command: whether it is one; `text` is then without the slash.
    """

    text: str
    command: bool = False


class Lines(Protocol):
    """Where lines come from."""

    def read(self, more: bool) -> str | None:
        """The next line without its end; None if there are no more. `more`: it belongs to the turn begun before.

        Raises UserError if it is no text.
        """


def next_turn(lines: Lines) -> Turn | None:
    """The next turn that is not empty; None at the end."""
    while (line := lines.read(False)) is not None:
        if line.lstrip().startswith(QUOTES):
            turn = Turn(_block(line.lstrip().removeprefix(QUOTES), lines))
        else:
            turn = _spoken(_continued(line, lines))
        if turn.text.strip() or turn.command:
            return turn
    return None


def _block(line: str, lines: Lines) -> str:
    """What stands up to the closing quotes."""
    found = []
    while not line.rstrip().endswith(QUOTES):
        found.append(line)
        following = lines.read(True)
        if following is None:
            raise UserError(f"the text that began with {QUOTES} never ends", f"close it with {QUOTES}")
        line = following
    found.append(line.rstrip().removesuffix(QUOTES))
    return "\n".join(found).strip("\n")


def _continued(line: str, lines: Lines) -> str:
    found = []
    while line.endswith("\\"):
        found.append(line[:-1])
        following = lines.read(True)
        if following is None:
            return "\n".join(found)
        line = following
    return "\n".join([*found, line])


def _spoken(text: str) -> Turn:
    if text.startswith("//"):
        return Turn(text[1:])
    return Turn(text[1:].strip(), command=True) if text.startswith("/") else Turn(text)


class Pipe:
    """Lines of a file or a pipe."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._number = stream, 0

    def read(self, more: bool) -> str | None:
        raw = self._stream.readline()
        if not raw:
            return None
        self._number += 1
        if self._number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"stdin: line {self._number} is not UTF-8 text (byte {error.start + 1})", NOT_UTF8
            ) from None


class Keyboard:
    """Lines typed on a terminal, with line editing and a history if Python has readline.

    Args:
        commands: what Tab completes after a slash.

    Attributes:
        begun: whether something stood in the line when Ctrl-C was last pressed.

    `read` raises KeyboardInterrupt at Ctrl-C.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self.begun = False
        self._commands = [f"/{name}" for name in commands]
        # Python would write the prompt to stdout, which holds nothing but answers when it is no terminal
        self._edits = sys.stdout.isatty()
        self._written: Callable[[], str] = str
        with contextlib.suppress(ImportError):
            import readline

            self._written = readline.get_line_buffer
            readline.set_completer(self._complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
            # several lines that are pasted are one turn
            readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self, more: bool) -> str | None:
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            return self._line(MORE if more else PROMPT)
        except EOFError:
            return None
        except UnicodeError:
            raise UserError("the line is not UTF-8 text", "type it again") from None
        finally:
            signal.signal(signal.SIGINT, before)

    def _line(self, prompt: str) -> str | None:
        if self._edits:
            line = input(prompt)
        else:
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                return None
        line.encode()  # a byte that is no character may come as half a surrogate pair
        return line.removesuffix("\n")

    def _interrupt(self, number: int, frame: object) -> None:
        # only here is the line still there: readline drops it before Python's exception arrives
        self.begun = bool(self._written())
        raise KeyboardInterrupt

    def _complete(self, text: str, state: int) -> str | None:
        found = [name for name in self._commands if name.startswith(text)] if text.startswith("/") else []
        return f"{found[state]} " if state < len(found) else None
