"""The form in which a template reads messages: what transformers does to them first, and what is found by trying.

Templates disagree on three things. Content is a string, or a list of parts (of models that also see images). The
arguments of a call are an object, or its JSON as a string. A message that only calls a tool has no content, or
empty content, or null. A probe is rendered in each form, and the first one in which its words come through is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llmctl.tokenizer.jinja import FAULTS, MARK, Message

# the names that reasoning has in records; transformers copies whichever is there to the two that templates read
REASONING = ("reasoning_content", "thinking", "reasoning")
Render = Callable[[Sequence[Message]], str]

# what content may be in a message that only calls a tool, in the order in which it is tried, and content that is text
ABSENT, KEPT = "<absent>", "<kept>"
EMPTY = ("", ABSENT, None)


def parts_of(text: str) -> list[dict[str, str]]:
    """Text as the list of parts that templates of multimodal models read."""
    return [{"type": "text", "text": text}]


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether the messages hold nothing but a role and text."""
    return all(len(message) == 2 and "content" in message for message in messages)


class Forms:
    """What one template, with or without tools, reads.

    Args:
        render: messages, in the form they shall have -> text. Raises one of `FAULTS`.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._calls: dict[tuple[Any, bool], tuple[Any, bool]] = {}
        self._parts: bool | None = None

    def prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages as the template reads them."""
        if self._parts is None:
            self._parts = self._reads_parts_only()
        if not self._parts and is_plain(messages):
            return messages
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        made = {key: value for key, value in message.items() if value is not None}
        reasoning = next((made[name] for name in REASONING if name in made), None)
        if reasoning is not None:  # in the order in which transformers puts them, which `tojson` shows
            made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
        if made.get("tool_calls"):
            made = self._calling(made)
        if "content" in made:
            made["content"] = self._content(made["content"])
        return made

    def _calling(self, message: Message) -> Message:
        strings = any(type(call["function"]["arguments"]) is str for call in message["tool_calls"])
        given = message.get("content", ABSENT)
        key = given if given in EMPTY else KEPT, strings
        if key not in self._calls:
            self._calls[key] = self._call(*key)
        content, as_text = self._calls[key]
        made = message | {"tool_calls": [_with_arguments(call, as_text) for call in message["tool_calls"]]}
        if content is ABSENT:
            made.pop("content", None)
        elif content is not KEPT:
            made["content"] = content
        return made

    def _call(self, content: Any, strings: bool) -> tuple[Any, bool]:
        """The content of a message that calls a tool (or KEPT), and whether its arguments are strings."""
        contents = [KEPT] if content is KEPT else [content, *(one for one in EMPTY if one != content)]
        tries = [(one, as_text) for one in contents for as_text in (strings, not strings)]
        kept = {one: self._keeps_call(*one) for one in tries}
        # with the content that was given, if it can be rendered: then it is what transformers renders
        possible = [one for one in tries if kept[one] is not None and one[0] == contents[0]]
        possible = possible or [one for one in tries if kept[one] is not None]
        return next((one for one in possible if kept[one]), (possible or tries)[0])

    def _keeps_call(self, content: Any, as_text: bool) -> bool | None:
        """Whether the template writes such a call; None if it raises."""
        arguments: Any = json.dumps({MARK: MARK}) if as_text else {MARK: MARK}
        # some templates insist on an id of nine characters
        call = {"type": "function", "id": "abcdefghi", "function": {"name": MARK, "arguments": arguments}}
        turn: Message = {"role": "assistant", "tool_calls": [call]}
        if content is not ABSENT:
            turn["content"] = self._content("!" if content is KEPT else content)
        try:
            text = self._render([{"role": "user", "content": self._content("?")}, turn])
        except FAULTS:
            return None
        # a string must come through as it is: `tojson` would put it into quotes once more
        return arguments in text if as_text else text.count(MARK) > 1

    def _content(self, text: Any) -> Any:
        return parts_of(text) if self._parts and isinstance(text, str) else text

    def _reads_parts_only(self) -> bool:
        turns = [{"role": role, "content": MARK} for role in ("user", "assistant")]
        if self._kept(turns):
            return False
        return self._kept([{**turn, "content": parts_of(MARK)} for turn in turns])

    def _kept(self, turns: Sequence[Message]) -> bool:
        """Whether the template writes both turns, with a system prompt before them if it must have one."""
        for before in ([], [{"role": "system", "content": turns[0]["content"]}]):
            try:
                if self._render([*before, *turns]).count(MARK) >= len(turns):
                    return True
            except FAULTS:
                continue
        return False


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if (type(arguments) is str) == as_text:
        return call
    other = json.dumps(arguments, ensure_ascii=False) if as_text else json.loads(arguments)
    return call | {"function": call["function"] | {"arguments": other}}
