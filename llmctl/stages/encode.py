"""From examples to ids with a mask, every one checked before it may train a model.

What is checked stands in `Encoder.check`; an error names the place of the record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerFast

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation, Preference, Text, Tools
from llmctl.data.statistics import in_batches
from llmctl.errors import UserError
from llmctl.stages.remarks import JOINED, SPLIT, UNTRAINABLE, remarks
from llmctl.tokenizer.answers import FORCED, REWRITTEN, UNENDED
from llmctl.tokenizer.forms import is_plain
from llmctl.tokenizer.render import Encoded, Message, PlainText, Rendered, Renderer, RenderError
from llmctl.tokenizer.twins import shipped

T = TypeVar("T")
COMPARED = 8  # rows of each number of turns for which the prompt is encoded by itself and compared


class Row(NamedTuple):
    """One example as the model sees it.

    Args:
        ids: token ids, BOS and end tokens as the template or the shape puts them.
        spans: [start, end) of what is trained.
        place: where the record lies, as "path:line".
        is_text: plain text, whose every token is trained and which may be split.
        why: why nothing of it can be trained; empty if something is.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    place: str
    is_text: bool = False
    why: str = ""


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
        split: make a row of its own of each answer that the template writes in another way once turns follow.

    Attributes:
        formats: format -> examples of it.
        answers: what is to be said of answers -> how many; see remarks.py.
        unwritten: what the template leaves out -> records that have it.
    """

    tokenizer: PreTrainedTokenizerFast
    mask_prompt: bool = True
    split: bool = False
    formats: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    unwritten: Counter[str] = field(default_factory=Counter)
    _seen: Counter[tuple[int, bool]] = field(default_factory=Counter)
    _told: tuple[str, set[str]] = field(default_factory=lambda: ("", set()))

    @cached_property
    def renderer(self) -> Renderer:
        """The chat template, made when the first conversation comes."""
        return Renderer(self.tokenizer, strict=False)

    @cached_property
    def _two_bos(self) -> list[int | None]:
        return 2 * [self.tokenizer.bos_token_id]

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.tokenizer)

    def rows(self, found: Iterable[Example]) -> Iterator[Row]:
        """Conversations, completions and texts as rows, in order.

        Raises UserError, with the place: a template that refuses the record or writes nothing of its answers,
        an end token that is not trained or does not stop generation, two BOS at the beginning,
        a prompt that would be other ids at inference, a record of preferences.
        """
        with ThreadPoolExecutor(1) as pool:
            for batch, ids in _one_behind(self._begun(iter(found), pool)):
                yield from self._finished(batch, *ids.result())

    def _begun(
        self, found: Iterator[Example], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Batch, Future[tuple[list[list[int]], list[list[int]]]]]]:
        """Batches as text. While one is tokenized, which is no work for Python, the next can be rendered."""
        for examples in in_batches(found):
            batch = _Batch([], [], [])
            for example in examples:
                shape = example.shape
                self.formats[example.format] += 1
                if isinstance(shape, Conversation):
                    for part, rendered in self._conversation(example, shape):
                        batch.examples.append(part)
                        batch.talks.append(rendered)
                    continue
                batch.examples.append(example)
                if isinstance(shape, Completion):
                    begin, text = len(shape.prompt), shape.prompt + shape.completion
                    batch.plain.append(Rendered(text, ((begin, len(text)),)))
                elif isinstance(shape, Text):
                    batch.plain.append(Rendered(shape.text, ()))
            yield batch, pool.submit(self._tokenized, batch)

    def _conversation(self, example: Example, shape: Conversation) -> Iterator[tuple[Example, Rendered]]:
        """A conversation, after one for each answer that is split off it, which ends with that answer."""
        whole = self.render(shape.messages, shape.tools, example)
        rewritten = [turn for why, turn in whole.left if why == REWRITTEN and self.split]
        for turn in rewritten:
            messages = shape.messages[: turn + 1]
            part = self.render(messages, shape.tools, example)
            own = [span for span, of in zip(part.spans, part.turns, strict=True) if of == turn]
            left = tuple((why, of) for why, of in part.left if of == turn)
            if own:
                self.answers[SPLIT] += 1
                yield (
                    replace(example, shape=replace(shape, messages=messages)),
                    part._replace(spans=tuple(own), turns=(turn,) * len(own), left=left),
                )
        left = tuple(item for item in whole.left if item[1] not in rewritten)
        yield example, whole._replace(left=left)

    def _tokenized(self, batch: _Batch) -> tuple[list[list[int]], list[list[int]]]:
        # without conversations there may be no template
        talks = self.renderer.ids(batch.talks) if batch.talks else []
        return talks, self._plain.ids(batch.plain)

    def _finished(
        self, batch: _Batch, talk_ids: list[list[int]], plain_ids: list[list[int]]
    ) -> Iterator[Row]:
        encoded = self.renderer.located(batch.talks, talk_ids) if batch.talks else []
        talks = zip(encoded, batch.talks, strict=True)
        plain = iter(self._plain.located(batch.plain, plain_ids))
        for example in batch.examples:
            place, shape = example.place, example.shape
            if isinstance(shape, Conversation):
                yield self._talk(*next(talks), shape, place)
            elif isinstance(shape, Completion | Text):
                yield self._written(sound(next(plain), place), place)
            else:
                pair = isinstance(shape, Preference)
                what = "a record of preferences" if pair else "an answer with a label"
                raise UserError(
                    f"{place}: {what} (`{example.format}`), not {'of one answer' if pair else 'one to learn'}",
                    "use it with `llmctl reward` or `llmctl dpo`" if pair else "`llmctl score` reads these",
                )

    def _talk(self, one: Encoded, rendered: Rendered, shape: Conversation, place: str) -> Row:
        why = self.check(one, rendered, shape, place)
        if why:
            return Row(one.ids, (), place, why=why)
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
            rendered = self.renderer.render(messages, tools)
        except RenderError as error:
            raise UserError(f"{example.place}: {error}", error.hint) from None
        if tools or not is_plain(messages):
            self._count_unwritten(example.place, set(self.renderer.unwritten(messages, tools)))
        return rendered

    def _count_unwritten(self, place: str, found: set[str]) -> None:
        """Each once a record, which may be rendered several times in a row: as both sides of a preference, say."""
        told, known = self._told
        known = known if place == told else set()
        self.unwritten.update(found - known)
        self._told = place, known | found

    def check(self, one: Encoded, rendered: Rendered, shape: Conversation, place: str) -> str:
        """Whether training on a conversation teaches what it says: why not if nothing of it can be trained, else "".

        Raises UserError if it would teach something else, because of the template.
        """
        ids, spans = one.ids, one.spans
        if ids[:2] == self._two_bos:
            raise UserError(
                f"{place}: the row begins with two BOS tokens", "take one of them out of the chat template"
            )
        reasons = [why for why, _ in rendered.left] + [JOINED] * one.joined
        self.answers.update(reasons)
        if not any(start < end for start, end in spans):
            if why := next((UNTRAINABLE[reason] for reason in reasons if reason in UNTRAINABLE), ""):
                return why
            raise UserError(
                f"{place}: no trained token in the row",
                "the chat template leaves the answer out; choose another with --template",
            )
        self._check_ends(one, rendered, shape, place)
        kind = len(shape.messages), shape.tools is None
        if self._seen[kind] < COMPARED and not one.joined:
            self._seen[kind] += 1
            self._compare_prompts(one, rendered, shape, place)
        return ""

    def _check_ends(self, one: Encoded, rendered: Rendered, shape: Conversation, place: str) -> None:
        """Does an answer end with what stops generation, if the template writes it?"""
        if self.renderer.ends_by_next_turn:
            return
        unended = {turn for why, turn in rendered.left if why == UNENDED}
        ends = dict(zip(rendered.turns, one.spans, strict=True))  # the last span of each answer
        for turn, (start, end) in ends.items():
            if turn in unended and shape.messages[turn].get("tool_calls"):
                continue  # what ends a call is known to the model's own list of end tokens
            if start < end and one.ids[end - 1] not in self.renderer.stop_ids:
                raise self._bad_end(one.ids, end, place)

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

    def _compare_prompts(self, one: Encoded, rendered: Rendered, shape: Conversation, place: str) -> None:
        """Is the prompt what chat would send? Where an answer begins is found in a faster way than this one."""
        forced = {turn for why, turn in rendered.left if why == FORCED}
        firsts = dict(
            zip(rendered.turns[::-1], one.spans[::-1], strict=True)
        )  # the first span of each answer
        for turn in firsts.keys() - forced:
            self.compare_prompt(one.ids, firsts[turn][0], shape.messages[:turn], shape.tools, place)

    def compare_prompt(
        self, ids: list[int], start: int, messages: list[Message], tools: Tools, place: str
    ) -> None:
        """Raise UserError if the first `start` ids are not the prompt of inference, with what may be trained after it."""
        try:
            asked = self.renderer.prompt_ids(messages, tools)
        except RenderError as error:
            raise UserError(f"{place}: {error}", error.hint) from None
        if asked == ids[: len(asked)] and len(asked) <= start:
            return
        at = next((i for i, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), start)
        raise UserError(
            f"{place}: the prompt is rendered in another way for training than for inference: "
            f"{self._shown(*ids[at : at + 4])} instead of {self._shown(*asked[at : at + 4])}",
            "choose another template with --template, as --template chatml",
        )

    def notes(self) -> Iterator[str]:
        """What is to be said of the examples, and of how their answers were found; after they were read."""
        if "renderer" in self.__dict__:
            if name := self.renderer.twin:
                yield f"answers are marked as in TRL's training template of `{name}`"
            elif not self.renderer.marked and shipped() is None:
                yield "TRL is not installed: its training templates of known models are not looked at"
        yield from remarks(self.answers, self.unwritten)

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
