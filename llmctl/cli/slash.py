"""The commands inside a conversation: words after a slash."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmctl.cli.output import figure
from llmctl.errors import UserError, nearest, one_of

if TYPE_CHECKING:
    from llmctl.recipe.chat import ChatSection
    from llmctl.stages.chat import Chat

Say = Callable[[str], None]
SETTINGS = ("temperature", "top_k", "top_p", "seed", "max_new_tokens", "history")
UNSET = "none"
NO_SYSTEM = "-"


class Leave(Exception):
    """The user wants to leave the conversation."""


class Command(NamedTuple):
    """What a word does.

    Args:
        usage: what may follow it, as /help shows it.
        about: what it is for.
        run: takes the conversation, what follows the word, and where to speak.
    """

    usage: str
    about: str
    run: Callable[[Chat, str, Say], None]


def obey(line: str, chat: Chat, say: Say) -> None:
    """Run one command.

    Args:
        line: the command without its slash.

    Raises:
        UserError: there is none of that name, or it cannot be done; the conversation is as it was.
        Leave: it says so.
    """
    word, _, rest = line.partition(" ")
    name = ALIASES.get(word, word)
    if name not in COMMANDS:
        close = nearest(word, [*COMMANDS, *ALIASES])
        hint = f"the nearest is `/{close}`" if close else "/help lists the commands"
        raise UserError(f"`/{word}` is not a command", f"{hint}, and `//{word}` says it to the model")
    COMMANDS[name].run(chat, rest.strip(), say)


def _help(chat: Chat, rest: str, say: Say) -> None:
    shown = {f"/{name} {command.usage}".rstrip(): command.about for name, command in COMMANDS.items()}
    wide = max(map(len, shown))
    for usage, about in shown.items():
        say(f"{usage:<{wide}}  {about}")
    say("")
    for rule in RULES:
        say(rule)


def _reset(chat: Chat, rest: str, say: Say) -> None:
    _refuse_words("reset", rest)
    chat.forget()
    kept = "" if chat.settings.system is None else "; the system prompt stays"
    say(f"a new conversation begins{kept}")


def _system(chat: Chat, rest: str, say: Say) -> None:
    if rest:
        chat.tell(None if rest == NO_SYSTEM else rest)
    said = chat.settings.system
    say("there is no system prompt" if said is None else f"system prompt: {said}")


def _save(chat: Chat, rest: str, say: Say) -> None:
    _write(chat, rest, say, "save", overwrite=False)


def _save_over(chat: Chat, rest: str, say: Say) -> None:
    _write(chat, rest, say, "save!", overwrite=True)


def _write(chat: Chat, rest: str, say: Say, name: str, *, overwrite: bool) -> None:
    if not rest:
        raise UserError(f"/{name} needs the name of a file", f"/{name} talk.json")
    path = Path(rest).expanduser()
    chat.save(path, overwrite)
    say(f"{path}: {len(chat.messages)} messages")


def _params(chat: Chat, rest: str, say: Say) -> None:
    changes = _pairs(rest)
    chat.settings = _changed(chat, changes)
    wide = max(map(len, SETTINGS))
    for name in SETTINGS:
        if not changes or name in changes:
            value = chat.settings.model_dump()[name]
            say(f"{name:<{wide}}  {UNSET if value is None else figure(value)}")


def _pairs(rest: str) -> dict[str, str]:
    """`name value` or `name=value`, several of them."""
    words = re.sub(r"\s*=\s*", " ", rest).split()
    for name in words[::2]:
        if name not in SETTINGS:
            close = nearest(name, list(SETTINGS))
            raise UserError(
                f"`{name}` is not one of {one_of(list(SETTINGS))}",
                f"did you mean `{close}`?" if close else "/params alone shows them",
            )
    if len(words) % 2:
        raise UserError(f"`{words[-1]}` has no value", f"/params {words[-1]} VALUE")
    return dict(zip(words[::2], words[1::2], strict=True))


def _changed(chat: Chat, changes: dict[str, str]) -> ChatSection:
    """The settings with some changed, checked as a recipe is."""
    from llmctl.recipe.chat import ChatRecipe
    from llmctl.recipe.load import load_recipe

    now = {f"chat.{name}": value for name, value in chat.settings.model_dump().items()}
    words = [f"chat.{k}={'null' if v.lower() == UNSET else v}" for k, v in changes.items()]
    try:
        return load_recipe(ChatRecipe, None, now, words).chat
    except UserError as error:
        raise UserError(error.message.removeprefix("command line: chat."), error.hint) from None


def _exit(chat: Chat, rest: str, say: Say) -> None:
    _refuse_words("exit", rest)
    raise Leave


def _refuse_words(name: str, rest: str) -> None:
    if rest:
        raise UserError(f"/{name} takes nothing after it, but got `{rest}`")


COMMANDS: dict[str, Command] = {
    "help": Command("", "show this", _help),
    "reset": Command("", "begin a new conversation", _reset),
    "system": Command("[TEXT]", f"show or set the system prompt; {NO_SYSTEM} takes it away", _system),
    "save": Command("FILE", "write the conversation, as data that `llmctl sft` reads", _save),
    "save!": Command("FILE", "the same, over a file that is there", _save_over),
    "params": Command("[NAME VALUE …]", "show or set how turns are answered", _params),
    "exit": Command("", "leave; Ctrl-D does too", _exit),
}
RULES = [
    'A line that ends in \\ goes on in the next, and """ encloses several lines.',
    "// at the beginning says a / to the model. Ctrl-C stops an answer.",
]
ALIASES = {"new": "reset", "quit": "exit", "?": "help"}
