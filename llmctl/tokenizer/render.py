"""Conversations as token ids: the one object that training, chat and serving render through.

A chat template turns messages into text; here the text becomes ids, and it is known which of them the
assistant writes. Text and ids are those of transformers, but for one thing: a token that begins or ends a turn, as
`<|im_end|>`, is seven characters' worth of ids where a message spells it out and never the token, so neither
data nor a user can end or forge a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.tokenizer.answers import EMPTY, UNTHOUGHT, Answer, Ends, Marked, trained_spans
from llmctl.tokenizer.control import control_tokens
from llmctl.tokenizer.forms import REASONING
from llmctl.tokenizer.guard import Guard
from llmctl.tokenizer.jinja import FAULTS, ChatTemplate, Message, first_line, parted
from llmctl.tokenizer.spans import Coder, Encoded, Rendered, Span, SpanError
from llmctl.tokenizer.template import TEMPLATES, TurnEnd, stop_ids, turn_end
from llmctl.tokenizer.written import Tools, Written

__all__ = ["Encoded", "Message", "PlainText", "RenderError", "Rendered", "Renderer"]

T = TypeVar("T")


class RenderError(ValueError):
    """A conversation this template cannot render; the caller knows where it came from."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Renderer:
    """A tokenizer's chat template, and how its text becomes ids.

    Args:
        strict: whether the template must be able to write a plain question and its answer. Where records are
            rendered it need not: what is wrong with it is told of a record.

    Raises ValueError if the tokenizer has no template, and UserError if it cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, strict: bool = True) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        self.tokenizer = tokenizer
        try:
            self._end, self.stop_ids = turn_end(tokenizer), frozenset(stop_ids(tokenizer))
        except UserError:
            if strict:
                raise
            eos = tokenizer.eos_token_id
            self._end, self.stop_ids = TurnEnd(), frozenset([] if eos is None else [eos])
        self._coder = Coder(tokenizer.backend_tokenizer)
        self._templates: dict[bool, Written] = {}
        self._twin: str | None = None

    @property
    def ends_by_next_turn(self) -> bool:
        """Whether it is the beginning of the next turn that ends an answer, so that the last one has no end."""
        return self._end.opener is not None

    @property
    def twin(self) -> str | None:
        """The name of the known template by whose training twin answers were found; None if none were."""
        return self._twin

    @property
    def marked(self) -> bool:
        """Whether the template says itself what the assistant writes."""
        return any(one.template.marked for one in self._templates.values())

    @cached_property
    def message_tokens(self) -> frozenset[int]:
        """Special tokens that are a part of what is said, as `<think>`."""
        special = {token for token, about in self.tokenizer.added_tokens_decoder.items() if about.special}
        return frozenset(special - set(self.tokenizer.convert_tokens_to_ids(self._control)))

    def render(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """A whole conversation as text, and what is trained of it. Raises RenderError if the template refuses it."""
        guarded, said = self._guarded(messages, tools), messages
        if guarded:
            messages, tools = self._guard.hidden(messages), self._guard.hidden(tools)
        text, marks = self._text(messages, tools, guarded)
        found = (self._proven if self._is_proven else self._found)(messages, tools, guarded, text, marks)
        unthought = [
            (UNTHOUGHT, turn) for turn in dict.fromkeys(found.turns) if not _keeps_thought(text, said[turn])
        ]
        return Rendered(text, found.spans, guarded, found.turns, (*found.left, *unthought))

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """The text after which the assistant begins to write; it has no spans."""
        guarded = self._guarded(messages, tools)
        if guarded:
            messages, tools = self._guard.hidden(messages), self._guard.hidden(tools)
        return Rendered(self._text(messages, tools, guarded, generation=True)[0], (), guarded)

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """The ids after which the assistant begins to write. Raises RenderError as `prompt`."""
        return self.encode([self.prompt(messages, tools)])[0].ids

    def unwritten(self, messages: Sequence[Message], tools: Tools) -> Iterator[str]:
        """What of a conversation the template leaves out, in words, in any conversation that has it."""
        written = self._written(tools)
        if tools and not written.keeps_tools:
            yield "tools"
        if any(message.get("tool_calls") for message in messages) and not written.keeps_calls:
            yield "calls of tools"
        yield from (f"`{key}`" for key in written.unread(messages))

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Texts as ids, many at a time."""
        return self.located(rendered, self.ids(rendered))

    def ids(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """The ids alone: the part of `encode` that takes long, and leaves Python to other threads."""
        return self._each(rendered, lambda coder, chosen: coder.ids([rendered[at] for at in chosen]))

    def located(self, rendered: Sequence[Rendered], ids: list[list[int]]) -> list[Encoded]:
        """The rest of `encode`."""

        def work(coder: Coder, chosen: Sequence[int]) -> list[Encoded]:
            found = coder.located([rendered[at] for at in chosen], [ids[at] for at in chosen])
            return [
                one if isinstance(one, Encoded) else coder.within(rendered[at], ids[at])
                for at, one in zip(chosen, found, strict=True)
            ]

        return self._each(rendered, work)

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

    # --- text -----------------------------------------------------------------------------------------

    def _written(self, tools: Tools) -> Written:
        found = self._templates.get(tools is not None)
        if found is None:
            found = self._templates[tools is not None] = Written(self.tokenizer, tools)
        return found

    def _text(
        self,
        messages: Sequence[Message],
        tools: Tools,
        guarded: bool,
        generation: bool = False,
        template: ChatTemplate | None = None,
    ) -> tuple[str, tuple[Span, ...]]:
        """The text without marks, and what they enclosed."""
        try:
            written = self._written(tools)
            prepared = written.forms.prepared(messages)
            text = (template or written.template).render(prepared, tools, generation)
        except FAULTS as error:
            raise RenderError(
                f"the chat template refuses it: {first_line(error)}",
                "mend the record, or choose another template with --template",
            ) from None
        return parted(self._guard.swapped(text) if guarded else text)

    def _possible(
        self, messages: Sequence[Message], tools: Tools, guarded: bool, generation: bool = False
    ) -> str | None:
        """The text; None if the template refuses it."""
        try:
            return self._text(messages, tools, guarded, generation)[0]
        except RenderError:
            return None

    # --- what is trained ------------------------------------------------------------------------------

    def _found(
        self, messages: Sequence[Message], tools: Tools, guarded: bool, text: str, marks: tuple[Span, ...]
    ) -> Marked:
        answers = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not self._written(tools).says_something(message):
                answers.append(Answer(turn, None, None, is_written=False))
                continue
            asked = self._possible(messages[:turn], tools, guarded, generation=True)
            last = turn + 1 == len(messages)
            through = text if last else self._possible(messages[: turn + 1], tools, guarded)
            before = ""
            if asked is not None and not text.startswith(asked):
                before = self._possible(messages[:turn], tools, guarded) or ""
            answers.append(Answer(turn, asked, through, before))
        given: tuple[Span, ...] | None = marks
        if not self._written(tools).template.marked:
            given = self._twin_marks(messages, tools, guarded, text)
        return trained_spans(text, answers, given, self._guarded_ends if guarded else self._plain_ends)

    def _proven(
        self, messages: Sequence[Message], tools: Tools, guarded: bool, text: str, marks: tuple[Span, ...]
    ) -> Marked:
        """As `_found`, of one of our own templates, whose marks need no proof."""
        answers = [(turn, message) for turn, message in enumerate(messages) if message["role"] == "assistant"]
        says = self._written(tools).says_something
        kept = [(turn, mark) for (turn, message), mark in zip(answers, marks, strict=True) if says(message)]
        turns = tuple(turn for turn, _ in kept)
        left = tuple((EMPTY, turn) for turn, _ in answers if turn not in turns)
        return Marked(tuple(mark for _, mark in kept), turns, left)

    def _twin_marks(
        self, messages: Sequence[Message], tools: Tools, guarded: bool, text: str
    ) -> tuple[Span, ...] | None:
        """What the training twin of the template marks; None without one, or if it writes something else."""
        twin = self._written(tools).twin
        if twin is None:
            return None
        try:
            theirs, marks = self._text(messages, tools, guarded, template=twin[1])
        except RenderError:
            return None
        if theirs != text:
            return None
        self._twin = twin[0]
        return marks

    @cached_property
    def _is_proven(self) -> bool:
        """Whether the template is one of ours, of which tests hold that prompts are the same everywhere."""
        return self.tokenizer.chat_template in TEMPLATES.values()

    # --- special tokens -------------------------------------------------------------------------------

    def _guarded(self, messages: Sequence[Message], tools: Tools) -> bool:
        try:
            return self._guard.needed(messages, tools)
        except FAULTS as error:  # the template is no Jinja
            raise RenderError(
                f"the chat template cannot be used: {first_line(error)}",
                "choose another template with --template",
            ) from None

    @cached_property
    def _control(self) -> list[str]:
        written = self._written(None)
        return control_tokens(self.tokenizer, written.source, written.probe, sorted(self.stop_ids))

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self.tokenizer.backend_tokenizer, self._control)

    @cached_property
    def _plain_ends(self) -> Ends:
        return self._ends_of(lambda text: text)

    @cached_property
    def _guarded_ends(self) -> Ends:
        return self._ends_of(self._guard.swapped)

    def _ends_of(self, written_as: Callable[[str], str]) -> Ends:
        """How answers end in texts in which `written_as` says what stands for a special token."""
        added = {token: about.content for token, about in self.tokenizer.added_tokens_decoder.items()}
        stops = [added[token] for token in self.stop_ids & added.keys() if token != self._end.opener]
        openers = [added[token] for token in [self._end.opener] if token in added]
        return Ends(
            *([written_as(text) for text in texts] for texts in (list(added.values()), stops, openers))
        )


def _keeps_thought(text: str, message: Message) -> bool:
    """Whether the reasoning of an answer stands in a text: in a key of its own, or in content before `</think>`."""
    thought = next((message[name] for name in REASONING if isinstance(message.get(name), str)), None)
    if thought is None:
        head, tag, _ = str(message.get("content") or "").partition("</think>")
        thought = head.rpartition("<think>")[2] if tag else ""
    return thought.strip() in text


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


PLAIN_HINT = "let the answer begin with the white space that the prompt ends with"
LOST = {
    False: "the end of the prompt is other tokens once the answer follows it",
    True: "the end of the answer is other tokens once the next turn follows it",
}


def _told(found: list[Encoded | SpanError], hint: str) -> list[Encoded | RenderError]:
    return [one if type(one) is Encoded else RenderError(LOST[one.end], hint) for one in found]
