"""The command that holds a conversation: reads turns, shows answers, obeys what begins with a slash."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.cli.answers import answer_for
from llmctl.cli.boundary import report
from llmctl.cli.options import RecipeFile, Words, flag, given, split_words
from llmctl.cli.output import can_draw, echo, harmless, one_line
from llmctl.cli.slash import ALIASES, COMMANDS, Leave, obey
from llmctl.cli.turns import Keyboard, Pipe, Turn, next_turn
from llmctl.errors import EXIT_INTERRUPTED, UsageError, UserError
from llmctl.talk import SILENT, Bar

if TYPE_CHECKING:
    from llmctl.recipe.chat import ChatRecipe
    from llmctl.stages.chat import Chat, Exchange

Handler = Callable[[int, object], None]
AsLines = Annotated[bool, typer.Option("--json", help="print one line of JSON for each answer")]


def chat(
    ctx: typer.Context,
    words: Words = None,
    system: Annotated[str | None, flag("chat", "system", "TEXT")] = None,
    max_new_tokens: Annotated[int | None, flag("chat", "max_new_tokens", "N")] = None,
    temperature: Annotated[float | None, flag("chat", "temperature", "X")] = None,
    top_k: Annotated[int | None, flag("chat", "top_k", "K")] = None,
    top_p: Annotated[float | None, flag("chat", "top_p", "P")] = None,
    seed: Annotated[int | None, flag("chat", "seed", "N")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("chat", "device", "NAME")] = None,
    threads: Annotated[str | None, flag("chat", "threads", "N|auto")] = None,
    as_json: AsLines = False,
) -> None:
    """Talk with MODEL.

    MODEL is a run folder, a Hugging Face folder or a hub id. On a terminal, /help lists the commands, Ctrl-C
    stops an answer and Ctrl-D leaves. From a pipe, every line is a turn of one conversation, and stdout holds
    the answers only. KEY=VALUE sets any field of the recipe; `llmctl recipe show chat` lists them.
    """
    from llmctl.recipe.chat import ChatRecipe
    from llmctl.recipe.load import load_recipe

    plain, overrides = split_words(words)
    if len(plain) > 1:
        raise UsageError(
            f"unexpected argument: {plain[1]}",
            "what you say is typed or piped in; `llmctl generate MODEL PROMPT --chat` takes one question",
        )
    flags = given(ctx, "chat") | {"base": plain[0] if plain else None}
    checked = load_recipe(ChatRecipe, recipe, flags, overrides)
    if checked.base is None:
        raise UsageError("missing argument MODEL", "name a run folder, a Hugging Face folder or a hub id")
    converse(checked, as_json)


def converse(recipe: ChatRecipe, as_json: bool = False) -> None:
    """Hold the conversation of a recipe, with a terminal or a pipe, until its end.

    Raises UserError: the model cannot be opened; from a pipe also what goes wrong later, for there is nobody
    to try again. Raises KeyboardInterrupt for Ctrl-C twice, or once where a pipe asks.
    """
    typed, notes = sys.stdin.isatty(), _Notes()
    with _opening(str(recipe.base), typed):
        from llmctl.stages import chat as stage

        opened = stage.begin(recipe, notes)
    if typed:
        whisper(f"{recipe.base} · {opened.summary}")
    for note in notes.lines:
        whisper(note)
    if typed:
        whisper("/help lists the commands, Ctrl-D leaves\n")
        _Typed(opened, as_json).run()
    else:
        _Piped(opened, as_json).run()


class _Notes:
    """What is said while a model is opened, kept for when the line that says so is gone."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def bar(self, label: str, total: float | None, unit: str) -> contextlib.AbstractContextManager[Bar]:
        return SILENT.bar(label, total, unit)


class _Piped:
    """A conversation with a pipe: the first error ends it."""

    def __init__(self, chat: Chat, as_json: bool) -> None:
        self._chat, self._as_json = chat, as_json
        self._pipe = Pipe(sys.stdin.buffer)

    def run(self) -> None:
        with contextlib.suppress(Leave):
            while (turn := next_turn(self._pipe)) is not None:
                _take(self._chat, turn, self._as_json, lambda: False)


class _Typed:
    """A conversation with a person: errors are told, and it goes on."""

    def __init__(self, chat: Chat, as_json: bool) -> None:
        self._chat, self._as_json = chat, as_json
        self._keyboard = Keyboard([*COMMANDS, *ALIASES])
        self._leaving = False  # Ctrl-C was the last thing that came

    def run(self) -> None:
        while True:
            try:
                turn = next_turn(self._keyboard)
                self._leaving = False
                if turn is None:
                    echo(file=sys.stderr)
                    return
                self._take(turn)
            except KeyboardInterrupt:
                self._interrupted()
            except UserError as error:
                report(error)
                echo(file=sys.stderr)
            except Leave:
                return

    def _take(self, turn: Turn) -> None:
        try:
            with stoppable(sys.stdin.fileno()) as stopped:
                _take(self._chat, turn, self._as_json, stopped)
        except KeyboardInterrupt:
            whisper("stopped at once; the turn is taken back")
        echo(file=sys.stderr)

    def _interrupted(self) -> None:
        """The line is dropped; nothing stood in it for the second time, and the program ends."""
        echo(file=sys.stderr)
        if self._leaving and not self._keyboard.begun:
            raise KeyboardInterrupt
        self._leaving = True
        whisper("Ctrl-C again leaves, and so does Ctrl-D")


def _take(chat: Chat, turn: Turn, as_json: bool, stopped: Callable[[], bool]) -> None:
    """Obey a command, or show the answer to a turn."""
    if turn.command:
        obey(turn.text, chat, whisper)
        return
    answer, exchange = answer_for(sys.stdout, as_json), None
    try:
        exchange = chat.ask(turn.text, answer.add, stopped)
    finally:
        answer.end(exchange)
    whisper(meter(exchange))


def meter(exchange: Exchange) -> str:
    """How full the context is, how fast the answer came, and why it ended if not by itself."""
    used = exchange.prompt_tokens + exchange.new_tokens
    parts = [
        f"{used:,} of {exchange.context:,} tokens",
        f"{exchange.tokens_per_second:,.1f} tokens/s",
    ]
    if not exchange.kept:
        parts.append("stopped before the first word; the turn is taken back")
    elif exchange.ended in ENDED:
        parts.append(ENDED[exchange.ended])
    return " · ".join(parts)


ENDED = {
    "length": "cut at max_new_tokens",
    "context": "the context is full; /reset begins a new conversation",
    "interrupted": "stopped",
}


def whisper(text: str) -> None:
    """A line on stderr that does not distract from the answers."""
    sys.stdout.flush()
    text = harmless(text)
    sys.stderr.write(f"\x1b[2m{text}\x1b[22m\n" if can_draw(sys.stderr) and text else f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _opening(where: str, typed: bool) -> Iterator[None]:
    """While a model is opened: says so, if that can be taken away again, and lets Ctrl-C end the program.

    At once, because libraries that are being imported make other errors of a KeyboardInterrupt.
    """
    drawn = typed and can_draw(sys.stderr)

    def interrupt(number: int, frame: object) -> None:
        ended()
        echo("interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    def ended() -> None:
        restore()
        sys.stderr.write("\r\x1b[K" if drawn else "")
        sys.stderr.flush()

    restore = _silent(sys.stdin.fileno()) if typed else _nothing
    try:
        with _signals(interrupt, restore):
            if drawn:
                sys.stderr.write(f"\x1b[2mopening {one_line(where)} …\x1b[22m")
                sys.stderr.flush()
            yield
    finally:
        ended()


@contextlib.contextmanager
def stoppable(terminal: int) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C be noted, while what is typed is not shown; yields whether it came. A second one interrupts at once.

    Args:
        terminal: file descriptor of the keyboard. It is as it was afterwards, even if the process is told to end.
    """
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    restore = _silent(terminal)
    try:
        with _signals(note, restore):
            yield lambda: pressed
    finally:
        restore()


@contextlib.contextmanager
def _signals(on_interrupt: Handler, restore: Callable[[], None]) -> Iterator[None]:
    """What Ctrl-C does; a request to end the process is met as ever, after the terminal is as it was."""

    def end(number: int, frame: object) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    handlers: dict[int, Handler] = {signal.SIGINT: on_interrupt, signal.SIGTERM: end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silent(terminal: int) -> Callable[[], None]:
    """Stop a terminal from showing what is typed: it would stand in the middle of an answer. Returns what undoes it."""
    try:
        import termios
    except ImportError:
        return _nothing
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    return lambda: termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _nothing() -> None:
    return
