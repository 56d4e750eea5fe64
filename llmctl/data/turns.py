"""From the values of a record to messages: roles, content, tool calls, in the ways people write them.

A message is a dict with `role` (system, user, assistant, tool) and `content` (text). An assistant
message may have `tool_calls`: [{"type": "function", "function": {"name": …, "arguments": …}}], where arguments are an
object or, as OpenAI writes them, its JSON; it then needs no content. All other keys, as `reasoning_content`, stay as
they are, for the chat template to read.

The functions here know the field they read and not the file. They raise `Bad` for what is wrong and
`Unusable` for what is to be dropped; the caller adds the place.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llmctl.data.array import why_not
from llmctl.data.records import DECODER, kind, listed, shown
from llmctl.errors import nearest, one_of

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of what an answer is preceded by
PLAIN = {"role", "content"}  # the keys of most messages
MEND = "mend or delete this record"
SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


class Bad(Exception):
    """A value is not what its field should hold."""

    def __init__(self, what: str, hint: str = MEND) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


class Unusable(Exception):
    """A record is well formed, and there is nothing in it to train on."""


def text(value: Any, field: str) -> str:
    """A string as it is; anything else is `Bad`."""
    if type(value) is not str:
        raise Bad(f"`{field}` is {kind(value)}, not text")
    return value


def optional_text(value: Any, field: str) -> str:
    """A string; empty if it is null or only white space."""
    if value is None:
        return ""
    return "" if text(value, field).isspace() else value


def messages(value: Any, field: str) -> list[Message]:
    """A list of {"role", "content"} or {"from", "value"} objects."""
    if type(value) is not list:
        raise Bad(f"`{field}` is {kind(value)}, not a list of messages")
    return [_message(item, field, number) for number, item in enumerate(value)]


def _message(item: Any, field: str, number: int) -> Message:
    if type(item) is not dict:
        raise Bad(f"`{field}[{number}]` is {kind(item)}, not a message")
    if "from" in item and "role" not in item:
        return _sharegpt(item, f"{field}[{number}]")
    role = item.get("role")
    known = ROLES.get(role) if type(role) is str else None
    content = item.get("content")
    if known is not None and type(content) is str and len(item) == 2:
        return {"role": known, "content": content}
    place = f"{field}[{number}]"
    if known is None:
        raise _unknown_role(item, "role", place, ROLES)
    if item.get("weight") == 0:
        raise Bad(f"`{place}` has weight 0, but every assistant turn is trained", "leave such records out")
    # in the order of the record, which a template may show; null is as good as absent, as in transformers
    made = {key: value for key, value in item.items() if value is not None} | {"role": known}
    calls = made.pop("tool_calls", None)
    if calls:
        if known != "assistant":
            raise Bad(f"`{place}` has tool_calls, but its role is `{role}`", "only the assistant calls tools")
        made["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    if content is not None or not (calls or thinks(made)):
        made["content"] = _content(item, "content", place)
    return made


def _sharegpt(item: dict[str, Any], place: str) -> Message:
    sender = item["from"]
    role = SENDERS.get(sender) if type(sender) is str else None
    if role is None:
        raise _unknown_role(item, "from", place, SENDERS)
    content = _content(item, "value", place)
    made: Message = {"role": role, "content": content}
    if len(item) > 2:
        made |= {
            key: item[key] for key in item if key not in ("from", "value", *made) and item[key] is not None
        }
    if sender == "function_call":
        called = _from_json(content, f"{place}.value")
        calls = called if type(called) is list else [called]
        return made | {"content": "", "tool_calls": _calls(calls, f"{place}.value")}
    return made


def _unknown_role(item: dict[str, Any], key: str, place: str, known: dict[str, str]) -> Bad:
    if key not in item:
        return _no_key(item, key, place)
    role = item[key]
    if type(role) is not str:
        return Bad(f"`{place}.{key}` is {kind(role)}, not a role")
    close = nearest(role, list(known))
    return Bad(
        f"`{place}.{key}`: `{shown(role)}` is not one of {one_of(list(known))}",
        f"did you mean `{close}`?" if close else MEND,
    )


def _no_key(item: dict[str, Any], key: str, place: str) -> Bad:
    close = nearest(key, list(item))
    has = listed(item) if item else "nothing"
    return Bad(
        f"`{place}` has no `{key}`; there is {has}",
        f"did you mean `{key}` by `{shown(close)}`?" if close else MEND,
    )


def _content(item: dict[str, Any], key: str, place: str) -> str:
    """Text, or a list of parts that are all text."""
    if key not in item:
        raise _no_key(item, key, place)
    value = item[key]
    if type(value) is not list:
        return text(value, f"{place}.{key}")
    parts = []
    for number, part in enumerate(value):
        if type(part) is not dict or part.get("type") != "text":
            raise Bad(f"`{place}.{key}[{number}]` is no text part", "only text can be trained on")
        parts.append(text(part.get("text"), f"{place}.{key}[{number}].text"))
    return "".join(parts)


# --- tools ------------------------------------------------------------------------------------------


def _from_json(value: str, place: str) -> Any:
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise Bad(f"`{place}` is not JSON ({why_not(error)})") from None


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    if type(value) is not list:
        raise Bad(f"`{place}` is {kind(value)}, not a list of calls")
    return [_call(call, f"{place}[{number}]") for number, call in enumerate(value)]


def _call(call: Any, place: str) -> dict[str, Any]:
    """{"name", "arguments"}, perhaps inside {"function": …}; arguments are an object or its JSON, and stay that."""
    inner = call.get("function", call) if type(call) is dict else call
    if type(inner) is not dict or type(inner.get("name")) is not str:
        raise Bad(f"`{place}` is no call of a function", 'a call is {"name": "…", "arguments": {…}}')
    arguments = inner.get("arguments")
    if arguments is None or (type(arguments) is str and not arguments.strip()):
        arguments = {}
    meant = _from_json(arguments, f"{place}.arguments") if type(arguments) is str else arguments
    if type(meant) is not dict:
        raise Bad(f"`{place}.arguments` is {kind(meant)}, not an object")
    if inner is call:
        made = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
        return made | ({"id": call["id"]} if type(call.get("id")) is str else {})
    made = {key: value for key, value in call.items() if value is not None}
    return (
        ({} if "type" in made else {"type": "function"})
        | made
        | {"function": inner | {"arguments": arguments}}
    )


def tools(value: Any, field: str = "tools") -> list[dict[str, Any]] | None:
    """A list of function schemas, or its JSON, each as {"type": "function", "function": …}; None if empty."""
    if type(value) is str:
        value = _from_json(value, field) if value.strip() else None
    if value is None or value == []:
        return None
    if type(value) is not list:
        raise Bad(f"`{field}` is {kind(value)}, not a list of tools")
    return [_tool(tool, f"{field}[{number}]") for number, tool in enumerate(value)]


def _tool(tool: Any, place: str) -> dict[str, Any]:
    inner = tool.get("function", tool) if type(tool) is dict else tool
    if type(inner) is not dict or type(inner.get("name")) is not str:
        raise Bad(
            f"`{place}` is no function schema",
            'a tool is {"name": "…", "description": "…", "parameters": {…}}',
        )
    return tool if inner is not tool else {"type": "function", "function": tool}


# --- whole conversations ----------------------------------------------------------------------------


def transcript(value: str, field: str) -> list[Message]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …", each without the one space that follows the colon."""
    apart = SPEAKER.split(value)
    if apart[0].strip() or apart[1:2] != ["Human"]:
        raise Bad(
            f"`{field}` is a string that does not begin with `\\n\\nHuman: `",
            "without `prompt`, chosen and rejected are lists of messages or such transcripts",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(apart[1::2], apart[2::2], strict=True)]


def thinks(turn: Message) -> bool:
    """Whether a turn has reasoning in a key of its own."""
    return any(type(turn.get(name)) is str and turn[name].strip() for name in REASONING)


def content_of(turn: Message) -> str:
    """The text of a turn; empty if it only calls a tool."""
    text: str = turn.get("content", "")
    return text


def says_nothing(turn: Message) -> bool:
    """Whether a turn has neither text, nor a call of a tool, nor reasoning."""
    return not content_of(turn).strip() and "tool_calls" not in turn and not thinks(turn)


def encodable(turns: list[Message]) -> bool:
    """Whether all text in the turns can be written as UTF-8: half a surrogate pair cannot."""
    return all(is_text(t["content"] if t.keys() == PLAIN else _as_json(t)) for t in turns)


def tools_encodable(given: list[dict[str, Any]] | None) -> bool:
    """Whether all text in the schemas of tools can be written as UTF-8."""
    return given is None or is_text(_as_json(given))


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
