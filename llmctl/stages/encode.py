"""From examples to ids with a mask, every one checked before it may train a model.

What is checked stands in `Encoder.check`; an error names the place of the record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerFast

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation, Preference, Text, Tools
from llmctl.errors import UserError
from llmctl.tokenizer.render import Encoded, Message, PlainText, Rendered, Renderer, RenderError

T = TypeVar("T")
BATCH = 512  # examples rendered and tokenized at a time
COMPARED = 8  # rows of each number of turns for which the prompt is encoded by itself and compared


class Row(NamedTuple):
    """One example as the model sees it.

    Args:
        ids: token ids, BOS and end tokens as the template or the shape puts them.
        spans: [start, end) of what is trained.
        place: where the record lies, as "path:line".
        is_text: plain text, whose every token is trained and which may be split.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    place: str
    is_text: bool = False


class _Batch(NamedTuple):
    """Examples, and their texts: of conversations, and of completions and texts, each in order."""

    examples: list[Example]
    talks: list[Rendered]
    plain: list[Rendered]


@dataclass
class Encoder:
    """A tokenizer and its chat template at work on examples.

    Args:
        mask_prompt: train only what the assistant writes.
    """

    tokenizer: PreTrainedTokenizerFast
    mask_prompt: bool = True
    formats: Counter[str] = field(default_factory=Counter)
    _seen: Counter[tuple[int, bool]] = field(default_factory=Counter)

    @cached_property
    def renderer(self) -> Renderer:
        """The chat template, made when the first conversation comes."""
        return Renderer(self.tokenizer)

    @cached_property
    def _two_bos(self) -> list[int | None]:
        return 2 * [self.tokenizer.bos_token_id]

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.tokenizer)

    def rows(self, found: Iterable[Example]) -> Iterator[Row]:
        """Conversations, completions and texts as rows, in order.

        Raises UserError, with the place: a template that refuses the record or loses part of it, no trained
        token, an end token that is not trained or does not stop generation, two BOS at the beginning,
        a prompt that would be other ids at inference, a record of preferences.
        """
        with ThreadPoolExecutor(1) as pool:
            for batch, ids in _one_behind(self._begun(iter(found), pool)):
                yield from self._finished(batch, *ids.result())

    def _begun(
        self, found: Iterator[Example], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Batch, Future[tuple[list[list[int]], list[list[int]]]]]]:
        """Batches as text. While one is tokenized, which is no work for Python, the next can be rendered."""
        while examples := list(islice(found, BATCH)):
            batch = _Batch(examples, [], [])
            for example in examples:
                shape = example.shape
                if isinstance(shape, Conversation):
                    batch.talks.append(self.render(shape.messages, shape.tools, example))
                elif isinstance(shape, Completion):
                    begin, text = len(shape.prompt), shape.prompt + shape.completion
                    batch.plain.append(Rendered(text, ((begin, len(text)),)))
                elif isinstance(shape, Text):
                    batch.plain.append(Rendered(shape.text, ()))
            yield batch, pool.submit(self._tokenized, batch)

    def _tokenized(self, batch: _Batch) -> tuple[list[list[int]], list[list[int]]]:
        # without conversations there may be no template
        talks = self.renderer.ids(batch.talks) if batch.talks else []
        return talks, self._plain.ids(batch.plain)

    def _finished(
        self, batch: _Batch, talk_ids: list[list[int]], plain_ids: list[list[int]]
    ) -> Iterator[Row]:
        talks = iter(self.renderer.located(batch.talks, talk_ids) if batch.talks else ())
        plain = iter(self._plain.located(batch.plain, plain_ids))
        for example in batch.examples:
            place, shape = example.place, example.shape
            self.formats[example.format] += 1
            if isinstance(shape, Conversation):
                yield self._talk(sound(next(talks), place), shape, place)
            elif isinstance(shape, Completion | Text):
                yield self._written(sound(next(plain), place), place)
            else:
                pair = isinstance(shape, Preference)
                what = "a record of preferences" if pair else "an answer with a label"
                raise UserError(
                    f"{place}: {what} (`{example.format}`), not {'of one answer' if pair else 'one to learn'}",
                    "use it with `llmctl reward` or `llmctl dpo`" if pair else "`llmctl score` reads these",
                )

    def _talk(self, one: Encoded, shape: Conversation, place: str) -> Row:
        self.check(one, shape.messages, shape.tools, place)
        return Row(one.ids, one.spans if self.mask_prompt else ((0, one.spans[-1][1]),), place)

    def _written(self, one: Encoded, place: str) -> Row:
        """Text between BOS and the end token; a completion has a span, from which on it is trained."""
        begin, end = self._ends
        ids = [*begin, *one.ids, *end]
        masked = self.mask_prompt and one.spans
        first = len(begin) + one.spans[0][0] if masked else 0
        return Row(ids, ((first, len(ids)),), place, is_text=not one.spans)

    def render(self, messages: list[Message], tools: Tools, example: Example) -> Rendered:
        """A conversation as text. Raises UserError with the example's place if the template refuses it."""
        try:
            return self.renderer.render(messages, tools)
        except RenderError as error:
            raise UserError(f"{example.place}: {error}", error.hint) from None

    def check(self, one: Encoded, messages: list[Message], tools: Tools, place: str) -> None:
        """Raise UserError if training on this conversation would teach something else than it says."""
        ids, spans = one
        if ids[:2] == self._two_bos:
            raise UserError(
                f"{place}: the row begins with two BOS tokens", "take one of them out of the chat template"
            )
        stops, roles = self.renderer.stop_ids, [message["role"] for message in messages]
        if not spans or any(start >= end for start, end in spans):
            raise UserError(
                f"{place}: no trained token in the row",
                "the chat template leaves the answer out; choose another with --template",
            )
        if len(spans) != roles.count("assistant"):
            raise UserError(
                f"{place}: the template marks {len(spans)} answers, the record has {roles.count('assistant')}",
                "mend its {% generation %} marks, or choose another with --template",
            )
        for _, end in spans:
            if ids[end - 1] not in stops:
                raise self._bad_end(ids, end, place)
        kind = len(roles), tools is None
        if self._seen[kind] < COMPARED:
            self._seen[kind] += 1
            self._compare_prompts(one, messages, tools, place)

    def _bad_end(self, ids: list[int], end: int, place: str) -> UserError:
        if end < len(ids) and ids[end] in self.renderer.stop_ids:
            return UserError(
                f"{place}: the end token {self._shown(ids[end])} after an answer is not trained",
                "put it inside the template's {% generation %} marks",
            )
        return UserError(
            f"{place}: an answer ends with {self._shown(ids[end - 1])}, which does not stop generation",
            "the template must end an answer with a special token; choose another with --template",
        )

    def _compare_prompts(self, one: Encoded, messages: list[Message], tools: Tools, place: str) -> None:
        """Is the prompt what chat would send? Where an answer begins is found in a faster way than this one."""
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        for (start, _), answer in zip(one.spans, answers, strict=True):
            try:
                asked = self.renderer.prompt_ids(messages[:answer], tools)
            except RenderError as error:
                raise UserError(f"{place}: {error}", error.hint) from None
            if asked != one.ids[:start]:
                at = next((i for i, (a, b) in enumerate(zip(asked, one.ids, strict=False)) if a != b), start)
                raise UserError(
                    f"{place}: the prompt is rendered in another way for training than for inference: "
                    f"{self._shown(*one.ids[at : at + 4])} instead of {self._shown(*asked[at : at + 4])}",
                    "choose another template with --template, as --template chatml",
                )

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What stands before and after text that no template renders."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [] if begin is None else [begin], [] if end is None else [end]

    def _shown(self, *ids: int) -> str:
        return f"`{repr(self.tokenizer.decode(list(ids)))[1:-1]}`"  # on one line


def _one_behind(items: Iterator[T]) -> Iterator[T]:
    """Each item when the next one is there; an error comes in its place, after the items before it."""
    held: list[T] = []
    try:
        for item in items:
            yield from held
            held = [item]
    except UserError:
        yield from held
        raise
    yield from held


def sound(found: Encoded | RenderError, place: str) -> Encoded:
    """What was encoded. Raises UserError with the place if it could not be."""
    if isinstance(found, RenderError):
        raise UserError(f"{place}: {found}", found.hint)
    return found
