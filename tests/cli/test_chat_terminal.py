"""`llmctl chat` on a terminal: Ctrl-C, Ctrl-D, line editing, and a terminal that is left as it was.

The program runs in a pseudo-terminal of its own, with a fake stage that answers at once or counts slowly.
"""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal

ROOT = Path(__file__).resolve().parent.parent.parent
SEQUENCE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|\r")
METER = "1,024 of 4,096 tokens"
AGAIN = "Ctrl-C again leaves, and so does Ctrl-D"
CTRL_A, CTRL_C, CTRL_D = "\x01", "\x03", "\x04"


class Session:
    """A program in a terminal."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:  # the program
            os.chdir(folder)
            names = {"TERM": "xterm", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"} | environment
            os.environ.pop("NO_COLOR", None)
            os.environ.update(names)
            os.execv(sys.executable, [sys.executable, "-m", "tests.cli.fake_chat", "chat", "model", *words])
        self.raw = ""
        self._seen = 0
        # a character may come in two pieces
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def wait(self, text: str, seconds: float = 30) -> str:
        """What was written up to `text`, since the last call; escape sequences are left out."""
        limit = time.monotonic() + seconds
        while text not in (written := SEQUENCE.sub("", self.raw))[self._seen :]:
            assert time.monotonic() < limit, f"{text!r} did not come: {self.raw!r}"
            self._read(0.1)
        end = written.index(text, self._seen) + len(text)
        found, self._seen = written[self._seen : end], end
        return found

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def press_later(self, key: str) -> None:
        """Press a key at an empty prompt, which stands there before Python waits for one."""
        time.sleep(0.3)
        self.type(key)

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at the prompt and wait for what it leads to.

        What is seen stands there before Python waits for the next key, and a signal between the two shows at
        that key only; no person is so fast. So a key that does nothing follows.
        """
        self.press_later(CTRL_C)
        time.sleep(0.3)
        if text not in SEQUENCE.sub("", self.read_what_there_is())[self._seen :]:
            self.type(CTRL_A)
        self.wait(text)

    def read_what_there_is(self) -> str:
        """All that was written so far."""
        self._read(0.1)
        return self.raw

    def left(self) -> int:
        """The exit code; negative is a signal."""
        limit = time.monotonic() + 30
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < limit, f"it did not end: {self.raw!r}"
            self._read(0.05)
        self._read(0.05)
        self.pid = 0
        return os.waitstatus_to_exitcode(ended[1])

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.terminal)[3] & termios.ECHO)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.terminal)

    def _read(self, seconds: float) -> None:
        if select.select([self.terminal], [], [], seconds)[0]:
            try:
                self.raw += self._decode(os.read(self.terminal, 1 << 16))
            except OSError:  # the other side is closed
                time.sleep(seconds)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    found = Session(tmp_path)
    found.wait("/help lists the commands, Ctrl-D leaves\n\n> ")
    yield found
    found.close()


def test_an_exchange_and_ctrl_d(session: Session) -> None:
    session.type("你好\n")
    assert session.wait("> ").endswith(f"you said: 你好\n{METER} · 12.3 tokens/s\n\n> ")
    assert "\x1b[1m你好" in session.raw and f"\x1b[2m{METER}" in session.raw
    session.type("/hlep\n")
    session.wait("error: `/hlep` is not a command\nhint: the nearest is `/help`")
    session.wait("> ")
    session.type("too long\n")
    session.wait("error: the prompt has 9,000 tokens, but the model's context is 4,096\n")
    session.wait("> ")
    session.press_later(CTRL_D)
    assert session.left() == 0
    assert "interrupted" not in session.raw


def test_ctrl_c_stops_the_answer_and_not_the_program(session: Session) -> None:
    session.type("count 2000\n")
    session.wait("3\n")
    assert not session.echoes
    session.type("typed too early")
    session.wait("9\n")
    session.type(CTRL_C)
    shown = session.wait(f"{METER} · 12.3 tokens/s · stopped\n\n> ")
    assert "typed" not in shown and "^C" not in shown
    session.type("hello\n")
    session.wait("you said: hello\n")
    session.wait("> ")
    session.type("/exit\n")
    assert session.left() == 0 and session.echoes


def test_ctrl_c_at_the_prompt(session: Session) -> None:
    """It drops the line; twice in a row on an empty line it leaves."""
    for text in ("one", "two"):  # something stood in the line, so the second does not leave
        session.type(text)
        session.wait(text)
        session.interrupt(f"\n{AGAIN}\n> ")
    session.type("hello\n")
    session.wait("you said: hello\n")
    session.wait("> ")
    session.interrupt(f"\n{AGAIN}\n> ")
    session.interrupt("\ninterrupted\n")
    assert session.left() == 130 and session.echoes


def test_ctrl_c_drops_a_turn_of_several_lines(session: Session) -> None:
    session.type("one\\\n")
    session.wait("… ")
    session.type("two")
    session.wait("two")
    session.interrupt(f"{AGAIN}\n> ")
    session.type("three\n")
    session.wait("you said: three\n")


def test_several_lines(session: Session) -> None:
    session.type("one\\\n")
    session.wait("… ")
    session.type("two\n")
    session.wait("you said: one\ntwo\n")
    session.wait("> ")
    # as a terminal sends what is pasted
    session.type("\x1b[200~three\nfour\x1b[201~")
    session.wait("four")
    session.type("\n")
    session.wait("you said: three\nfour\n")


def test_line_editing(session: Session) -> None:
    session.type("/par\t")
    session.wait("/params ")
    session.type("\n")
    session.wait("temperature     0.7\n")
    session.wait("> ")
    session.type("wolrd\x1b[D\x1b[D\x7f\x1b[Cl\n")  # twice left, rub out, right
    session.wait("you said: world\n")
    session.wait("> ")
    session.type("\x1b[A\n")  # up
    session.wait("you said: world\n")


def test_a_request_to_end_leaves_the_terminal_as_it_was(session: Session) -> None:
    session.type("count 2000\n")
    session.wait("3\n")
    assert not session.echoes
    os.kill(session.pid, signal.SIGTERM)
    assert session.left() == -signal.SIGTERM and session.echoes


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_a_terminal_that_cannot_draw(environment: dict[str, str], tmp_path: Path) -> None:
    session = Session(tmp_path, **environment)
    try:
        session.wait("> ")
        session.type("hello\n")
        session.wait(f"you said: **hello**\n{METER}")
        session.wait("> ")
        session.press_later(CTRL_D)
        assert session.left() == 0
        assert not re.search(r"\x1b\[[\d;]*[mKJA]", session.raw)
    finally:
        session.close()


def test_an_answer_longer_than_the_screen_is_there_once(session: Session) -> None:
    session.type("count 40\n")
    session.wait(METER)
    terminal = Terminal(80, 24)
    terminal.write(session.raw[session.raw.index("count 40") :].replace("\r\n", "\n"))
    assert terminal.lines[:41] == ["count 40", *map(str, range(40))]
