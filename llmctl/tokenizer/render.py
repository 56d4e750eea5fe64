"""Conversations as token ids: the one object that training, chat and serving render through.

A chat template turns messages into text; here the text becomes ids, and it is known which of them the
assistant writes. What a message contains stays text: a `<|im_end|>` in it is seven characters' worth of
ids and never the token, so neither data nor a user can end or forge a turn.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from llmctl.tokenizer.load import encodings
from llmctl.tokenizer.template import MARK, stop_ids

Message = dict[str, Any]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# private characters around the number of a special token that a message spells out, while it is rendered
OPEN, CLOSE = "\ue0f7", "\ue0f8"
GUARDED = re.compile(f"{OPEN}(\\d+){CLOSE}")


class RenderError(ValueError):
    """A conversation this template cannot render faithfully; the caller knows where it came from."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Args:
        spans: [start, end) in characters of what the assistant writes, the end of its turn included.
        guarded: a message spelled out a special token, so the text holds placeholders.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    guarded: bool = False


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids; `spans` are [start, end) in tokens of what the assistant writes."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]


class Renderer:
    """A tokenizer's chat template, and how its text becomes ids.

    Raises ValueError if the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids(tokenizer))
        added = tokenizer.added_tokens_decoder.values()
        self._special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._names = tokenizer.special_tokens_map
        self._keeps: dict[bool, bool] = {}

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> Rendered:
        """A whole conversation as text. Raises RenderError if the template refuses or loses something."""
        messages, guarded = self._guard(messages)
        self._refuse_lost_tools(messages, tools)
        if GENERATION.search(self.tokenizer.get_chat_template(tools=tools)):
            texts, spans = self._jinja(messages, tools, marks=True)
            return Rendered(texts[0], tuple(map(tuple, spans[0])), guarded)
        return Rendered(*self._incremental(messages, tools), guarded)

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> Rendered:
        """The text after which the assistant begins to write."""
        messages, guarded = self._guard(messages)
        self._refuse_lost_tools(messages, tools)
        return Rendered(self._text(messages, tools, generation=True), (), guarded)

    def prompt_ids(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The ids after which the assistant begins to write. Raises RenderError as `prompt`."""
        found = self.encode([self.prompt(messages, tools)])[0]
        assert isinstance(found, Encoded)  # only the beginning of an answer can fail
        return found.ids

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded | RenderError]:
        """Texts as ids, many at a time.

        A RenderError stands where a token reaches across the beginning of an answer: generation could
        never begin there.
        """
        plain = [one for one in rendered if not one.guarded]
        found = iter(_encode_all(self.tokenizer, plain, special=True))
        return [_caught(self._encode_guarded, one) if one.guarded else next(found) for one in rendered]

    # --- text -----------------------------------------------------------------------------------------

    def _jinja(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        *,
        marks: bool = False,
        generation: bool = False,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        try:
            return render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation,
                **self._names,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise RenderError(
                f"the chat template refuses it: {_first_line(error)}",
                "mend the record, or choose another template with --template",
            ) from None

    def _text(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generation: bool = False
    ) -> str:
        return self._jinja(messages, tools, generation=generation)[0][0]

    def _incremental(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """For a template without generation marks: an answer is what is new when it is added."""
        whole = self._text(messages, tools)
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:place], tools, generation=True)
            through = self._text(messages[: place + 1], tools)
            if not through.startswith(before) or not whole.startswith(through):
                raise RenderError(
                    f"the chat template writes turn {place + 1} in another way once it is part of a conversation",
                    "choose another template with --template, or put {% generation %} marks into this one",
                )
            ends = [found.end() for found in self._spelled.finditer(through, len(before))]
            spans.append((len(before), ends[-1] if ends else len(through)))
        return whole, tuple(spans)

    def _refuse_lost_tools(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> None:
        """Raise RenderError if the template would drop tools or calls without a word."""
        for wanted, what in ((bool(tools), True), (any(m.get("tool_calls") for m in messages), False)):
            if wanted and not self._keeps_tools(what):
                raise RenderError(
                    f"the chat template does not write {'tools' if what else 'tool calls'}",
                    "choose one that does: --template chatml",
                )

    def _keeps_tools(self, definitions: bool) -> bool:
        if definitions not in self._keeps:
            function = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
            call = {"type": "function", "function": {"name": MARK, "arguments": {}}}
            turns: list[Message] = [{"role": "user", "content": "?"}]
            tools = [{"type": "function", "function": function}] if definitions else None
            if not definitions:
                turns += [{"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                self._keeps[definitions] = MARK in self._text(turns, tools)
            except RenderError:
                self._keeps[definitions] = False
        return self._keeps[definitions]

    # --- special tokens spelled out in a message -------------------------------------------------------

    def _guard(self, messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
        """The messages with placeholders for every special token they spell out."""
        if not any(self._spelled.search(_all_text(message)) for message in messages):
            return messages, False
        return [_mapped(message, self._guarded) for message in messages], True

    def _guarded(self, text: str) -> str:
        return self._spelled.sub(lambda found: f"{OPEN}{self._special.index(found[0])}{CLOSE}", text)

    def _restored(self, text: str) -> str:
        return GUARDED.sub(lambda found: self._special[int(found[1])], text)

    def _encode_guarded(self, rendered: Rendered) -> Encoded:
        """Between the template's own special tokens everything is plain text, as the tokenizer would cut it."""
        ids: list[int] = []
        bounds: dict[int, int] = {}
        wanted = sorted({bound for span in rendered.spans for bound in span})
        for start, end in _between(self._spelled, rendered.text):
            piece = rendered.text[start:end]
            inside = [bound for bound in wanted if start <= bound < end]
            if self._spelled.fullmatch(piece):
                bounds |= dict.fromkeys(inside, len(ids))
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                continue
            encoding = encodings(self.tokenizer, [self._restored(piece)], special=False)[0]
            for bound in inside:
                at = len(self._restored(rendered.text[start:bound]))
                bounds[bound] = len(ids) + _token_at(encoding, at, len(self._restored(piece)))
            ids += encoding.ids
        bounds[len(rendered.text)] = len(ids)
        return Encoded(ids, tuple((bounds[start], bounds[end]) for start, end in rendered.spans))


def encode_plain(
    tokenizer: PreTrainedTokenizerFast, rendered: Sequence[Rendered]
) -> list[Encoded | RenderError]:
    """As `Renderer.encode`, for text that no template rendered: special tokens in it are text."""
    return _encode_all(tokenizer, rendered, special=False)


def _encode_all(
    tokenizer: PreTrainedTokenizerFast, rendered: Sequence[Rendered], special: bool
) -> list[Encoded | RenderError]:
    found = encodings(tokenizer, [one.text for one in rendered], special=special)
    return [_caught(_located, *pair) for pair in zip(found, rendered, strict=True)]


def _caught(work: Callable[..., Encoded], *what: Any) -> Encoded | RenderError:
    try:
        return work(*what)
    except RenderError as error:
        return error


def _located(encoding: Encoding, rendered: Rendered) -> Encoded:
    length = len(rendered.text)
    return Encoded(
        encoding.ids,
        tuple(
            (_token_at(encoding, start, length), _token_at(encoding, end, length))
            for start, end in rendered.spans
        ),
    )


def _token_at(encoding: Encoding, char: int, length: int) -> int:
    """The first token that begins at `char` or later."""
    for place in range(char, length):
        token = encoding.char_to_token(place)
        if token is None:
            continue  # a character that the normalizer takes away
        if encoding.token_to_chars(token)[0] < char:
            raise RenderError(
                "one token holds the end of the prompt and the beginning of the answer",
                "choose a template whose prompt ends with a line break, as --template chatml",
            )
        return token
    return len(encoding.ids)


def _between(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    """[start, end) of every match and of everything between them, in order; empty ones left out."""
    edges = [0, *(edge for found in pattern.finditer(text) for edge in found.span()), len(text)]
    return [(start, end) for start, end in itertools.pairwise(edges) if start < end]


def _all_text(message: Message) -> str:
    content = message.get("content") or ""
    if len(message) == 2 and isinstance(content, str):
        return content
    return json.dumps(message, ensure_ascii=False)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(".") if lines else type(error).__name__
    return said[:1].lower() + said[1:]
