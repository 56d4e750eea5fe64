"""Draw docs/figures/*.svg from real terminal sessions.

python docs/pictures.py                every picture, by the `llmctl` beside this Python; the quickstart takes minutes
python docs/pictures.py --work D       in a folder that is kept, so that drawing again is quick
python docs/pictures.py chat --work D  one of them

A session runs in a pseudo-terminal. What it writes goes through a small screen, which knows what progress bars
and streaming answers send (return, line feed, cursor moves, erasing, colours), and that is drawn by rich.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.cells import get_character_cell_size
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

FIGURES = Path(__file__).resolve().parent / "figures"
SEQUENCE = re.compile(
    r"\x1b\[(?P<numbers>[?>=]?[\d;:]*)[ -/]*(?P<kind>[@-~])"  # CSI
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC: window titles, links
    r"|\x1b[()][0-9A-B]|\x1b[=>78cDEHMNOZ]"
    r"|(?P<control>[\r\n\b\t\x07])"
    r"|(?P<text>[^\x1b\x00-\x1f]+)"
)
ROWS = 50  # of the terminal; the picture is as high as what was written


@dataclass(frozen=True)
class Scene:
    """One picture: what is typed at the shell, and then at what the program asks.

    `keys` are pairs: what must stand last on the screen, and what is then typed.
    """

    command: str
    keys: tuple[tuple[str, str], ...] = ()
    columns: int = 80
    last_rows: int | None = None
    seconds: float = 1800.0


# --- the screen -------------------------------------------------------------------------------------


class Screen:
    """Lines of (character, colours); a wide character is followed by an empty cell. Nothing scrolls away."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self.colours = ""
        self._pending = ""

    def feed(self, text: str) -> None:
        """Take what a program wrote. A sequence that is cut off waits for its rest."""
        text = self._pending + text
        position = 0
        while position < len(text):
            match = SEQUENCE.match(text, position)
            if match is None:
                if text[position] == "\x1b" and len(text) - position < 200:
                    break
                position += 1  # a control character that draws nothing
                continue
            position = match.end()
            if match["text"]:
                for character in match["text"]:
                    self.put(character)
            elif match["control"]:
                self.control(match["control"])
            elif match["kind"]:
                self.sequence(match["kind"], match["numbers"])
        self._pending = text[position:]

    def put(self, character: str) -> None:
        """Write a character where the cursor is, and move on; past the edge a new line begins."""
        width = get_character_cell_size(character)
        if width == 0:
            return
        if self.column + width > self.columns:
            self.row, self.column = self.row + 1, 0
        line = self.line()
        line.extend([(" ", "")] * (self.column + width - len(line)))
        line[self.column] = (character, self.colours)
        if width == 2:
            line[self.column + 1] = ("", self.colours)
        self.column += width

    def line(self) -> list[tuple[str, str]]:
        """The line of the cursor."""
        while self.row >= len(self.lines):
            self.lines.append([])
        return self.lines[self.row]

    def control(self, character: str) -> None:
        """Return, line feed, backspace and tab; the bell is silent."""
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            self.line()
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character == "\t":
            self.column = min(self.columns - 1, self.column // 8 * 8 + 8)

    def sequence(self, kind: str, numbers: str) -> None:
        """Cursor moves, erasing and colours; modes such as a hidden cursor draw nothing."""
        count = int(numbers) if numbers.isdigit() else 0
        if kind == "m":
            self.colours = "" if numbers in ("", "0") else f"{self.colours}\x1b[{numbers}m"
        elif kind in "AF":
            self.row = max(0, self.row - max(1, count))
        elif kind in "BE":
            self.row += max(1, count)
        elif kind == "C":
            self.column = min(self.columns - 1, self.column + max(1, count))
        elif kind == "D":
            self.column = max(0, self.column - max(1, count))
        elif kind == "G":
            self.column = max(1, count) - 1
        elif kind == "K" and count == 1:
            gone = min(self.column + 1, len(self.line()))
            self.line()[:gone] = [(" ", "")] * gone
        elif kind == "K":
            del self.line()[self.column if count == 0 else 0 :]
        elif kind == "J" and count == 0:
            del self.line()[self.column :], self.lines[self.row + 1 :]
        if kind in "EF":
            self.column = 0

    def plain(self) -> str:
        """The text, without colours."""
        return "\n".join("".join(character for character, _ in line).rstrip() for line in self.lines)

    def ansi(self, last_rows: int | None = None) -> str:
        """The text with its colours, without empty lines at the end: all, or the first line and the last ones."""
        lines = list(self.lines)
        while lines and not any(character.strip() for character, _ in lines[-1]):
            lines.pop()
        if last_rows and len(lines) > last_rows + 2:
            lines = [lines[0], [("…", "\x1b[2m")], *lines[-last_rows:]]
        return "\n".join(map(coloured, lines))


def coloured(line: list[tuple[str, str]]) -> str:
    """One line with a sequence wherever its colours change."""
    parts, before = [], ""
    for character, colours in line:
        if colours != before:
            parts.append(f"\x1b[0m{colours}")
            before = colours
        parts.append(character)
    return f"{''.join(parts).rstrip()}\x1b[0m"


# --- the session ------------------------------------------------------------------------------------


def play(scene: Scene, work: Path) -> Screen:
    """Run a scene in a pseudo-terminal. Raises TimeoutError if it does not end, with what is on the screen."""
    screen = Screen(scene.columns)
    screen.feed(f"\x1b[1;32m$\x1b[0m {scene.command}\r\n")
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, scene.columns, 0, 0))
        os.chdir(work)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", PATH=path)
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.execvp("sh", ["sh", "-c", scene.command])  # noqa: S606  (the session's shell)
    try:
        converse(terminal, screen, scene)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return screen


def converse(terminal: int, screen: Screen, scene: Scene) -> None:
    """Pass what the program writes to the screen, and type the scene's keys when it waits for them."""
    keys = list(scene.keys)
    rest = b""
    end = time.monotonic() + scene.seconds
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.3)
        if ready:
            try:
                read = os.read(terminal, 65536)
            except OSError:  # Linux says so when the program has ended
                return
            if not read:
                return
            text = (rest + read).decode("utf-8", errors="ignore")
            rest = (rest + read)[len(text.encode()) :]
            screen.feed(text)
        elif keys and screen.plain().rstrip().endswith(keys[0][0].rstrip()):
            os.write(terminal, keys.pop(0)[1].encode())
    raise TimeoutError(f"the session did not end; the screen:\n{screen.plain()}")


# --- the picture ------------------------------------------------------------------------------------

# red, green, blue of background, text, and the eight colours of a terminal: plain, then bright
DARK = "3c4048 f07178 8cc878 e8be6e 6eaaf0 c896e6 64c8d2 d4d8e0"
BRIGHT = "6e7480 ff8c91 a5e191 fad78c 8cc3ff dcaffa 82e1eb ffffff"


def triple(word: str) -> tuple[int, int, int]:
    """`3c4048` as red, green, blue."""
    red, green, blue = bytes.fromhex(word)
    return red, green, blue


def theme() -> TerminalTheme:
    """The colours of the pictures, legible on dark."""
    dark, bright = ([triple(word) for word in words.split()] for words in (DARK, BRIGHT))
    return TerminalTheme((24, 26, 31), (212, 216, 224), dark, bright)


# Fonts are the reader's own: nothing is fetched. Rich stretches each run to the width of its cells.
FORMAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{unique_id}">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Noto Sans CJK SC", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-family: system-ui, sans-serif; font-size: 16px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def drawn(screen: Screen, name: str, last_rows: int | None = None) -> str:
    """The screen as an SVG that needs nothing but itself."""
    console = Console(
        record=True, width=screen.columns, file=StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text.from_ansi(screen.ansi(last_rows)), soft_wrap=True)
    return console.export_svg(title="", theme=theme(), code_format=FORMAT, unique_id=name)


def main() -> int:
    """Draw the pictures that are asked for."""
    words = argparse.ArgumentParser(description="draw pictures of terminal sessions")
    words.add_argument("name", nargs="?", choices=list(SCENES), help="picture to draw; all when unset")
    words.add_argument("--work", type=Path, help="folder to run in; a temporary one when unset")
    given = words.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="pictures-"))
    work.mkdir(parents=True, exist_ok=True)
    for name in [given.name] if given.name else SCENES:
        screen = play(SCENES[name], work)
        FIGURES.mkdir(exist_ok=True)
        target = FIGURES / f"{name}.svg"
        target.write_text(drawn(screen, name, SCENES[name].last_rows), encoding="utf-8")
        sys.stderr.write(f"{target}\n")
    return 0


# In this order: the later ones show what the quickstart has made.
SCENES: dict[str, Scene] = {
    "quickstart": Scene(
        "llmctl quickstart", ((">", "Where does Judy live?\r"), (">", "\x04")), columns=90, last_rows=28
    ),
    "chat": Scene(
        "llmctl chat runs/quickstart/gptq4 --temperature 0 chat.history=false",
        (
            (">", "Where does Judy live?\r"),
            (">", "In which month was Marco born?\r"),
            (">", "/params\r"),
            (">", "\x04"),
        ),
    ),
    "inspect": Scene("llmctl data inspect builtin:tinyworld-instructions --model runs/quickstart/sft"),
}

if __name__ == "__main__":
    sys.exit(main())
