"""From examples to ids with a mask, every one checked before it may train a model.

What is checked stands in `Encoder._check`; an error names the place of the record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from transformers import PreTrainedTokenizerFast

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation, Text, Tools
from llmctl.errors import UserError
from llmctl.tokenizer.load import encode_batch
from llmctl.tokenizer.render import Encoded, Message, Rendered, Renderer, RenderError, encode_plain

BATCH = 512  # examples rendered and tokenized at a time
COMPARED = 8  # rows of each kind for which the prompt is rendered as for inference and compared


@dataclass(frozen=True, slots=True)
class Row:
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


@dataclass
class Encoder:
    """A tokenizer and its chat template at work on examples.

    Args:
        mask_prompt: train only what the assistant writes.
    """

    tokenizer: PreTrainedTokenizerFast
    mask_prompt: bool = True
    formats: Counter[str] = field(default_factory=Counter)
    _seen: Counter[tuple[object, ...]] = field(default_factory=Counter)

    @cached_property
    def renderer(self) -> Renderer:
        """The chat template, made when the first conversation comes."""
        return Renderer(self.tokenizer)

    @cached_property
    def _two_bos(self) -> list[int | None]:
        return 2 * [self.tokenizer.bos_token_id]

    def rows(self, found: Iterable[Example]) -> Iterator[Row]:
        """Conversations, completions and texts as rows, in order.

        Raises UserError, with the place: a template that refuses the record or loses part of it, no trained
        token, an end token that is not trained or does not stop generation, two BOS at the beginning,
        a prompt that would be other ids at inference, a record of preferences.
        """
        found = iter(found)
        while batch := list(islice(found, BATCH)):
            yield from self._batch(batch)

    def _batch(self, batch: list[Example]) -> Iterator[Row]:
        rows: list[Row | None] = [None] * len(batch)
        for kind, encode in (
            (Conversation, self._talks),
            (Completion, self._completions),
            (Text, self._texts),
        ):
            chosen = [index for index, one in enumerate(batch) if type(one.shape) is kind]
            if chosen:  # without conversations there may be no template
                for index, row in zip(chosen, encode([batch[index] for index in chosen]), strict=True):
                    rows[index] = row
        for example, row in zip(batch, rows, strict=True):
            self.formats[example.format] += 1
            if row is None:
                raise UserError(
                    f"{example.place}: a record of preferences (`{example.format}`), not of one answer",
                    "use it with `llmctl reward` or `llmctl dpo`",
                )
            yield row

    def _texts(self, batch: list[Example]) -> Iterator[Row]:
        before, after = self._ends()
        texts = [example.shape.text for example in batch if isinstance(example.shape, Text)]
        for example, ids in zip(batch, encode_batch(self.tokenizer, texts), strict=True):
            whole = [*before, *ids, *after]
            yield Row(whole, ((0, len(whole)),), example.place, is_text=True)

    def _completions(self, batch: list[Example]) -> Iterator[Row]:
        before, after = self._ends()
        shapes = [example.shape for example in batch if isinstance(example.shape, Completion)]
        texts = [
            Rendered(one.prompt + one.completion, ((len(one.prompt), len(one.prompt) + len(one.completion)),))
            for one in shapes
        ]
        for example, found in zip(batch, encode_plain(self.tokenizer, texts), strict=True):
            place = example.place
            one = sound(found, place)
            ((start, _),) = one.spans
            whole = [*before, *one.ids, *after]
            yield Row(whole, ((len(before) + start if self.mask_prompt else 0, len(whole)),), place)

    def _talks(self, batch: list[Example]) -> Iterator[Row]:
        rendered = []
        for example in batch:
            assert isinstance(example.shape, Conversation)
            with telling(example.place):
                rendered.append(self.renderer.render(example.shape.messages, example.shape.tools))
        for example, found in zip(batch, self.renderer.encode(rendered), strict=True):
            assert isinstance(example.shape, Conversation)
            place = example.place
            one = sound(found, place)
            self.check(one, example.shape.messages, example.shape.tools, place)
            spans = one.spans if self.mask_prompt else ((0, one.spans[-1][1]),)
            yield Row(one.ids, spans, place)

    def check(self, one: Encoded, messages: list[Message], tools: Tools, place: str) -> None:
        """Raise UserError if training on this conversation would teach something else than it says."""
        ids = one.ids
        if ids[:2] == self._two_bos:
            raise UserError(
                f"{place}: the row begins with two BOS tokens", "take one of them out of the chat template"
            )
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if not one.spans or any(start >= end for start, end in one.spans):
            raise UserError(
                f"{place}: no trained token in the row",
                "the chat template leaves the answer out; choose another with --template",
            )
        if len(one.spans) != len(answers):
            raise UserError(
                f"{place}: the template marks {len(one.spans)} answers, the record has {len(answers)}",
                "mend its {% generation %} marks, or choose another with --template",
            )
        for _, end in one.spans:
            self._check_end(ids, end, place)
        self._compare_prompts(one, messages, tools, answers, place)

    def _check_end(self, ids: list[int], end: int, place: str) -> None:
        last, stops = ids[end - 1], self.renderer.stop_ids
        if last in stops:
            return
        if end < len(ids) and ids[end] in stops:
            raise UserError(
                f"{place}: the end token {self._shown(ids[end])} after an answer is not trained",
                "put it inside the template's {% generation %} marks",
            )
        raise UserError(
            f"{place}: an answer ends with {self._shown(last)}, which does not stop generation",
            "the template must end an answer with a special token; choose another with --template",
        )

    def _compare_prompts(
        self,
        one: Encoded,
        messages: list[Message],
        tools: Tools,
        answers: list[int],
        place: str,
    ) -> None:
        """The first rows of each kind: is the prompt what chat would send? Templates branch on roles and tools."""
        kind = (tuple(message["role"] for message in messages), tools is not None)
        self._seen[kind] += 1
        if self._seen[kind] > COMPARED:
            return
        for (start, _), answer in zip(one.spans, answers, strict=True):
            with telling(place):
                asked = self.renderer.prompt_ids(messages[:answer], tools)
            if asked != one.ids[:start]:
                at = next((i for i, (a, b) in enumerate(zip(asked, one.ids, strict=False)) if a != b), start)
                raise UserError(
                    f"{place}: the prompt is rendered in another way for training than for inference: "
                    f"{self._shown(*one.ids[at : at + 4])} instead of {self._shown(*asked[at : at + 4])}",
                    "choose another template with --template, as --template chatml",
                )

    def _ends(self) -> tuple[list[int], list[int]]:
        """What stands before and after text that no template renders."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return tuple([] if token is None else [token] for token in ids)

    def _shown(self, *ids: int) -> str:
        return f"`{repr(self.tokenizer.decode(list(ids)))[1:-1]}`"  # on one line


def sound(found: Encoded | RenderError, place: str) -> Encoded:
    """What was encoded. Raises UserError with the place if it could not be."""
    if isinstance(found, RenderError):
        raise UserError(f"{place}: {found}", found.hint)
    return found


@contextmanager
def telling(place: str) -> Iterator[None]:
    """Turn a RenderError into a UserError that names the place."""
    try:
        yield
    except RenderError as error:
        raise UserError(f"{place}: {error}", error.hint) from None
