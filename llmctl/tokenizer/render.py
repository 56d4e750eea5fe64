"""Conversations as token ids: the one object that training, chat and serving render through.

A chat template turns messages into text; here the text becomes ids, and it is known which of them the
assistant writes. What a message contains stays text: a `<|im_end|>` in it is seven characters' worth of
ids and never the token, so neither data nor a user can end or forge a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.guard import PLACEHOLDER, Guard
from llmctl.tokenizer.jinja import FAULTS, ChatTemplate, Message, first_line, parted
from llmctl.tokenizer.spans import Coder, Encoded, Rendered, Span, SpanError
from llmctl.tokenizer.template import MARK, TEMPLATES, stop_ids

__all__ = ["Encoded", "Message", "PlainText", "RenderError", "Rendered", "Renderer"]

Tools = list[dict[str, Any]] | None
T = TypeVar("T")
SHOWN = 24  # characters of a text, in a message


class RenderError(ValueError):
    """A conversation this template cannot render faithfully; the caller knows where it came from."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Renderer:
    """A tokenizer's chat template, and how its text becomes ids.

    Raises ValueError if the tokenizer has no template, and UserError if it cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids(tokenizer))
        self._guard = Guard(tokenizer.backend_tokenizer)
        self._coder = Coder(tokenizer.backend_tokenizer)
        self._templates: dict[bool, ChatTemplate] = {}
        self._keeps: dict[bool, bool] = {}

    def render(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """A whole conversation as text. Raises RenderError if the template refuses or loses something."""
        return self._rendered(messages, tools, generation=False)

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """The text after which the assistant begins to write; it has no spans."""
        return self._rendered(messages, tools, generation=True)

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """The ids after which the assistant begins to write. Raises RenderError as `prompt`."""
        found = self.encode([self.prompt(messages, tools)])[0]
        assert isinstance(found, Encoded)  # only spans can have no place
        return found.ids

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded | RenderError]:
        """Texts as ids, many at a time.

        A RenderError stands where the prompt is other tokens once the answer follows it: generation could
        never begin there.
        """
        return self.located(rendered, self.ids(rendered))

    def ids(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """The ids alone: the part of `encode` that takes long, and leaves Python to other threads."""
        return self._each(rendered, lambda coder, chosen: coder.ids([rendered[at] for at in chosen]))

    def located(self, rendered: Sequence[Rendered], ids: list[list[int]]) -> list[Encoded | RenderError]:
        """The rest of `encode`."""

        def work(coder: Coder, chosen: Sequence[int]) -> list[Encoded | SpanError]:
            return coder.located([rendered[at] for at in chosen], [ids[at] for at in chosen])

        return _told(self._each(rendered, work), TEMPLATE_HINT)

    def _each(self, rendered: Sequence[Rendered], work: Callable[[Coder, Sequence[int]], list[T]]) -> list[T]:
        """What is made of each, by the coder for texts with placeholders or by that for those without."""
        guarded = [at for at, one in enumerate(rendered) if one.guarded]
        if not guarded:
            return work(self._coder, range(len(rendered)))
        plain = [at for at, one in enumerate(rendered) if not one.guarded]
        found = [*work(self._coder, plain), *work(self._guarded_coder, guarded)]
        return [one for _, one in sorted(zip([*plain, *guarded], found, strict=True), key=itemgetter(0))]

    @cached_property
    def _guarded_coder(self) -> Coder:
        return Coder(self._guard.backend)

    def _rendered(self, messages: Sequence[Message], tools: Tools, *, generation: bool) -> Rendered:
        guarded = self._guard.needed(messages, tools)
        if guarded:
            messages, tools = self._guard.hidden(messages), self._guard.hidden(tools)
        self._refuse_lost_tools(messages, tools)
        text, spans = self._text(messages, tools, guarded, generation)
        if generation:
            return Rendered(text, (), guarded)
        if not self._template(tools).marked:
            spans = self._incremental(messages, tools, text, guarded)
        elif not self._is_proven:
            self._compare_prompts(messages, tools, Rendered(text, spans, guarded))
        return Rendered(text, spans, guarded)

    def _template(self, tools: Tools) -> ChatTemplate:
        found = self._templates.get(tools is not None)
        if found is None:
            source = self.tokenizer.get_chat_template(tools=tools)
            found = ChatTemplate(source, self.tokenizer.special_tokens_map)
            self._templates[tools is not None] = found
        return found

    def _text(
        self, messages: Sequence[Message], tools: Tools, guarded: bool, generation: bool = False
    ) -> tuple[str, tuple[Span, ...]]:
        """The text without marks, and what they enclosed."""
        try:
            text = self._template(tools).render(messages, tools, generation)
        except FAULTS as error:
            raise RenderError(
                f"the chat template refuses it: {first_line(error)}",
                "mend the record, or choose another template with --template",
            ) from None
        return parted(self._guard.swapped(text) if guarded else text)

    def _incremental(
        self, messages: Sequence[Message], tools: Tools, whole: str, guarded: bool
    ) -> tuple[Span, ...]:
        """For a template without generation marks: an answer is what is new when it is added."""
        written = PLACEHOLDER if guarded else self._guard.spelled
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._text(messages[:place], tools, guarded, generation=True)
            last = place + 1 == len(messages)
            through = whole if last else self._text(messages[: place + 1], tools, guarded)[0]
            if not through.startswith(before) or not whole.startswith(through):
                raise RenderError(
                    f"the chat template writes turn {place + 1} in another way once it is part of a conversation",
                    "choose another template with --template, or put {% generation %} marks into this one",
                )
            ends = [found.end() for found in written.finditer(through, len(before))]
            spans.append((len(before), ends[-1] if ends else len(through)))
        return tuple(spans)

    @cached_property
    def _is_proven(self) -> bool:
        """Whether the template is one of ours, of which tests hold that prompts are the same everywhere."""
        return self.tokenizer.chat_template in TEMPLATES.values()

    def _compare_prompts(self, messages: Sequence[Message], tools: Tools, one: Rendered) -> None:
        """Raise RenderError if a prompt is not what stands before its answer: templates branch on many things."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(answers) != len(one.spans):
            return  # which the caller finds
        for place, (start, _) in zip(answers, one.spans, strict=True):
            asked = self._text(messages[:place], tools, one.guarded, generation=True)[0]
            if asked != one.text[:start]:
                at = next((i for i, (a, b) in enumerate(zip(asked, one.text, strict=False)) if a != b), start)
                raise RenderError(
                    "the prompt is rendered in another way for training than for inference: "
                    f"{_shown(one.text[at:])} instead of {_shown(asked[at:])}",
                    "choose another template with --template, as --template chatml",
                )

    def _refuse_lost_tools(self, messages: Sequence[Message], tools: Tools) -> None:
        """Raise RenderError if the template would drop tools or calls without a word."""
        if tools and not self._keeps_tools(definitions=True):
            raise RenderError("the chat template does not write tools", TOOLS_HINT)
        for message in messages:
            if "tool_calls" in message and message["tool_calls"] and not self._keeps_tools(definitions=False):
                raise RenderError("the chat template does not write tool calls", TOOLS_HINT)

    def _keeps_tools(self, definitions: bool) -> bool:
        if definitions not in self._keeps:
            function = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
            # some templates insist on an id of nine characters
            call = {"type": "function", "id": "abcdefghi", "function": {"name": MARK, "arguments": {}}}
            turns: list[Message] = [{"role": "user", "content": "?"}]
            tools = [{"type": "function", "function": function}] if definitions else None
            if not definitions:
                turns += [{"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                self._keeps[definitions] = MARK in self._text(turns, tools, guarded=False)[0]
            except RenderError:
                self._keeps[definitions] = False
        return self._keeps[definitions]


class PlainText:
    """Text that no template rendered, at work as `Renderer`: special tokens in it are text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._coder = Coder(tokenizer.backend_tokenizer, special=False)
        self.ids = self._coder.ids

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded | RenderError]:
        """Texts as ids, many at a time; a RenderError stands where an answer joins its prompt."""
        return self.located(texts, self.ids(texts))

    def located(self, texts: Sequence[Rendered], ids: list[list[int]]) -> list[Encoded | RenderError]:
        """What `encode` does after `ids`."""
        return _told(self._coder.located(texts, ids), PLAIN_HINT)


TEMPLATE_HINT = "choose a template whose prompt ends with a line break, as --template chatml"
TOOLS_HINT = "choose one that does: --template chatml"
PLAIN_HINT = "let the answer begin with the white space that the prompt ends with"
LOST = {
    False: "the end of the prompt is other tokens once the answer follows it",
    True: "the end of the answer is other tokens once the next turn follows it",
}


def _told(found: list[Encoded | SpanError], hint: str) -> list[Encoded | RenderError]:
    return [one if type(one) is Encoded else RenderError(LOST[one.end], hint) for one in found]


def _shown(text: str) -> str:
    """The beginning of a text, on one line."""
    return f"`{repr(text[:SHOWN])[1:-1]}`"
