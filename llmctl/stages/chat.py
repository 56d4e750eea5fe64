"""`llmctl chat`: a conversation with a model, turn by turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerFast

from llmctl.engine.sampling import sampler
from llmctl.engine.session import Session
from llmctl.errors import UserError
from llmctl.files import write_atomic
from llmctl.model import LlmctlForCausalLM
from llmctl.model.packed import paths_of
from llmctl.plan.size import total_parameters
from llmctl.recipe.chat import ChatRecipe, ChatSection
from llmctl.stages.generate import end_ids, open_writer, prompt_ids, written
from llmctl.talk import Talk
from llmctl.tokenizer.jinja import MARK
from llmctl.tokenizer.render import Message, Renderer, RenderError
from llmctl.tokenizer.stream import TextStream

Ended = Literal["stop", "length", "context", "interrupted"]
SAVED = (".json", ".jsonl")


@dataclass(frozen=True)
class Exchange:
    """A turn and its answer.

    Args:
        ended: by an end token, by `max_new_tokens`, by the end of the context, or by the user.
        prompt_tokens: of the whole conversation up to the answer.
        new_tokens: of the answer, the end token included.
        context: tokens the model can hold.
        tokens_per_second: of the tokens after the first, which waits for the prompt.
    """

    prompt: str
    text: str
    ended: Ended
    prompt_tokens: int
    new_tokens: int
    context: int
    tokens_per_second: float

    @property
    def kept(self) -> bool:
        """Whether it is part of the conversation: not if it was broken off before anything was said."""
        return self.ended != "interrupted" or bool(self.text.strip())


def begin(recipe: ChatRecipe, talk: Talk) -> Chat:
    """Open a model for a conversation.

    Raises UserError: the model or tokenizer cannot be loaded or do not fit, the chat template cannot write
    a question and its answer, or has no place for the system prompt.
    """
    assert recipe.base is not None
    settings = recipe.chat
    model, tokenizer = open_writer(recipe.base, recipe.device, settings, "chat", talk)
    if paths := paths_of(model):
        talk.say(f"quantized: {paths}")
    if tokenizer.chat_template is None:
        talk.say(f"{recipe.base} has no chat template: each text is continued, below what came before")
        return Chat(model, tokenizer, _Plain(tokenizer, recipe.base), settings)
    return Chat(model, tokenizer, _Templated(tokenizer, recipe.base), settings)


class Chat:
    """A conversation.

    Attributes:
        settings: how the next turn is answered. A system prompt is set with `tell`, which checks it.
        turns: what was said so far, without the system prompt.
        context: tokens the model can hold.
    """

    def __init__(
        self,
        model: LlmctlForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        form: _Form,
        settings: ChatSection,
    ) -> None:
        self.settings = settings
        self.turns: list[Message] = []
        self.context: int = model.config.max_position_embeddings
        self._model, self._tokenizer, self._form = model, tokenizer, form
        self._session, self._ends = Session(model), end_ids(model, tokenizer)
        self._asked = 0
        self.tell(settings.system)

    @property
    def summary(self) -> str:
        """What answers, on a line."""
        size = total_parameters(self._model.config.spec)
        place = self._model.model.embed_tokens.weight.device.type
        kind = str(self._model.dtype).removeprefix("torch.")
        return f"{size:,} parameters · context {self.context:,} · {kind} on {place}"

    @property
    def messages(self) -> list[Message]:
        """The conversation, system prompt first."""
        system = self.settings.system
        return ([] if system is None else [{"role": "system", "content": system}]) + self.turns

    def tell(self, system: str | None) -> None:
        """Set the system prompt of the whole conversation; None takes it away.

        Raises UserError if there is no place for one; nothing is changed then.
        """
        if system is not None:
            self._form.refuse_system()
        self.settings = self.settings.model_copy(update={"system": system})

    def forget(self) -> None:
        """Begin anew; system prompt and settings stay."""
        self.turns = []

    def ask(
        self,
        text: str,
        on_text: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Exchange:
        """Say something and get the answer. If it cannot be given, the conversation is as it was.

        Args:
            on_text: called with each bit of the answer as it is complete.
            stopped: asked after every token whether the answer shall end there.

        Raises UserError: the template refuses the conversation, or there is no room for an answer.
        """
        before = list(self.turns)
        self.turns = [*before, {"role": "user", "content": text}]
        try:
            found = self._answer(text, on_text, stopped)
        except BaseException:
            self.turns = before
            raise
        answer = {"role": "assistant", "content": found.text}
        self.turns = [*self.turns, answer] if found.kept else before
        return found

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the conversation as a record of messages, or without history every exchange as one.

        `data inspect` and `sft` read them.

        Raises UserError: nothing was said yet, the name does not end in .json or .jsonl, the file is there
        already and may not be overwritten, or it cannot be written.
        """
        if not self.turns:
            raise UserError("nothing was said yet, so there is nothing to save")
        if path.suffix not in SAVED:
            raise UserError(
                f"{path}: a conversation is saved as .json or .jsonl", f"name it {path.stem or 'talk'}.json"
            )
        records = [{"messages": messages} for messages in self._records()]
        if path.suffix == ".jsonl":
            text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        else:
            text = json.dumps(records, ensure_ascii=False, indent=2)
        try:
            if path.exists() and not overwrite:
                raise UserError(f"{path}: exists already", f"/save! {path} overwrites it")
            write_atomic(path, text + "\n", "choose another folder")
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path}: {path.parent} is not a folder", "choose another name") from None
        except OSError as error:
            why = (error.strerror or type(error).__name__).lower()
            raise UserError(f"{path}: cannot be written ({why})", "choose another name") from None

    def _records(self) -> list[list[Message]]:
        """What the model was shown, answers included."""
        if self.settings.history:
            return [self.messages]
        system = self.messages[: -len(self.turns)]
        return [[*system, *self.turns[at : at + 2]] for at in range(0, len(self.turns), 2)]

    def _answer(
        self, text: str, on_text: Callable[[str], None] | None, stopped: Callable[[], bool]
    ) -> Exchange:
        settings, messages = self.settings, self.messages
        ids = self._form.ids(messages if settings.history else messages[: -len(self.turns)] + messages[-1:])
        room = self.context - len(ids)
        if room < 1:
            raise self._no_room(len(ids))
        wanted = min(settings.max_new_tokens, room)
        # a generator of its own for every turn: the same seed and questions give the same answers
        seed = settings.seed + self._asked
        self._asked += 1
        sample = sampler(settings.temperature, settings.top_k, settings.top_p, seed)
        ends = frozenset[int]() if settings.ignore_eos else self._ends
        stream = TextStream(self._tokenizer, ids, self._form.said)
        made = self._session.generate(ids, wanted, sample, ends)
        tokens, speed = written(made, stream, on_text, stopped)
        ended: Ended = "length" if wanted < room else "context"
        if tokens[-1] in ends:
            ended = "stop"
        elif stopped():
            ended = "interrupted"
        return Exchange(text, stream.text, ended, len(ids), len(tokens), self.context, speed)

    def _no_room(self, length: int) -> UserError:
        first = len(self.turns) == 1 or not self.settings.history
        return UserError(
            f"{'the prompt' if first else 'with this turn the conversation'} has {length:,} tokens, "
            f"but the model's context is {self.context:,}; the turn is taken back",
            "say it in fewer words" if first else "/reset begins a new conversation",
        )


class _Form(Protocol):
    """How a conversation becomes a prompt.

    Attributes:
        said: special tokens that are a part of what is said, and of the conversation from then on.
    """

    said: frozenset[int]

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the answer to the last message begins. Raises UserError."""

    def refuse_system(self) -> None:
        """Raise UserError if there is no place for a system prompt."""


class _Templated:
    """Through the chat template, as in training."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, where: str) -> None:
        self._where = where
        try:
            self._renderer = Renderer(tokenizer)
        except UserError as error:
            raise UserError(f"{where}: {error.message}", MEND) from None
        self.said = self._renderer.message_tokens

    def ids(self, messages: Sequence[Message]) -> list[int]:
        try:
            ids = self._renderer.prompt_ids(messages)
        except RenderError as error:
            raise UserError(f"{self._where}: {error}", MEND) from None
        if not ids:
            raise UserError(f"{self._where}: the chat template writes nothing", MEND)
        return ids

    def refuse_system(self) -> None:
        turns: list[Message] = [{"role": "system", "content": MARK}, {"role": "user", "content": "?"}]
        try:
            kept = MARK in self._renderer.prompt(turns).text
        except RenderError as error:
            raise UserError(f"{self._where}: a system prompt cannot be given: {error}", NO_SYSTEM) from None
        if not kept:
            raise UserError(
                f"{self._where}: a system prompt cannot be given: the chat template does not write it",
                NO_SYSTEM,
            )


class _Plain:
    """Text after text, for a model without a template: what the user writes begins on a line of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, where: str) -> None:
        self._tokenizer, self._where, self.said = tokenizer, where, frozenset[int]()

    def ids(self, messages: Sequence[Message]) -> list[int]:
        text = ""
        for message in messages:
            if message["role"] == "user" and text and not text.endswith("\n"):
                text += "\n"
            text += message["content"]
        return prompt_ids(self._tokenizer, text, False, self._where)

    def refuse_system(self) -> None:
        raise UserError(
            f"{self._where}: a system prompt cannot be given: the tokenizer has no chat template",
            "write it as the first text",
        )


MEND = "mend the chat template that lies beside the tokenizer"
NO_SYSTEM = "say it in the first turn"
