"""One template of a tokenizer at work on conversations, and what is found of it by trying."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.forms import REASONING, Forms
from llmctl.tokenizer.jinja import FAULTS, MARK, ChatTemplate, Message, parted
from llmctl.tokenizer.twins import twin_of

Tools = list[dict[str, Any]] | None
Spans = tuple[tuple[int, int], ...]

# keys whose absence from a template is no loss: what they say stands elsewhere in the conversation
QUIET = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "id", "weight"})
FUNCTION = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
PROBE_TOOLS = [{"type": "function", "function": FUNCTION}]


class Written:
    """The template that a tokenizer uses for conversations with tools, or for those without.

    Args:
        tools: of which kind they are.

    Raises TemplateSyntaxError: the template is not Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tools: Tools) -> None:
        given = None if tools is None else PROBE_TOOLS
        self.source: str = tokenizer.get_chat_template(tools=given)
        self._names = tokenizer.special_tokens_map
        self.template = ChatTemplate(self.source, self._names)
        self.forms = Forms(lambda messages: self.template.render(messages, given))

    def probe(self, messages: Sequence[Message], generation: bool) -> str:
        """A conversation without tools as text, for looking at the template itself. Raises one of `FAULTS`."""
        return parted(self.template.render(self.forms.prepared(messages), None, generation))[0]

    @cached_property
    def twin(self) -> tuple[str, ChatTemplate] | None:
        """The name of the known template that this one is, and its training twin, if it has no marks of its own."""
        found = None if self.template.marked else twin_of(self.source)
        return None if found is None else (found[0], ChatTemplate(found[1], self._names))

    @cached_property
    def keeps_tools(self) -> bool:
        """Whether it writes the schemas of tools."""
        return self._keeps([{"role": "user", "content": "?"}], PROBE_TOOLS)

    @cached_property
    def keeps_calls(self) -> bool:
        """Whether it writes calls of tools."""
        # some templates insist on an id of nine characters
        call = {"type": "function", "id": "abcdefghi", "function": {"name": MARK, "arguments": {}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self._keeps([{"role": "user", "content": "?"}, calling], None)

    def _keeps(self, turns: list[Message], tools: Tools) -> bool:
        try:
            return MARK in self.template.render(self.forms.prepared(turns), tools)
        except FAULTS:
            return False

    def says_something(self, message: Message) -> bool:
        """Whether it writes anything of a message."""
        if message.get("content", "").strip():
            return True
        if message.get("tool_calls") and self.keeps_calls:
            return True
        return any(message.get(name) and self.reads(name) for name in REASONING)

    def reads(self, key: str) -> bool:
        """Whether it reads a key of messages."""
        names = REASONING if key in REASONING else (key,)
        return any(re.search(rf"\b{re.escape(name)}\b", self.source) for name in names)

    def unread(self, messages: Sequence[Message]) -> Iterator[str]:
        """Keys of messages that the template does not read."""
        keys = {key for message in messages if len(message) > 2 for key in message} - QUIET
        keys -= set(REASONING)  # which is looked for in what is written, answer by answer
        yield from (key for key in sorted(keys) if not self.reads(key))
