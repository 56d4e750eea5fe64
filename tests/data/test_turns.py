"""Records that stop the reading: keys that fit nothing, values of a wrong type; each with place and field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.turns import assistant, call, error, said, user, write

Q, A, B = "What is it?", "This.", "That."
ROLES = "`system`, `developer`, `user`, `assistant`, `tool`, `function`"
SENDERS = "`system`, `human`, `user`, `gpt`, `assistant`, `function_call`, `observation`, `function`, `tool`"
TOOL_LINE = 'a tool is {"name": "…", "description": "…", "parameters": {…}}'
CALL_LINE = 'a call is {"name": "…", "arguments": {…}}'


def called(value: str) -> dict[str, Any]:
    return {"conversations": [said("function_call", value)]}


def with_call(call: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": call}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    # keys
    (
        {"instrucion": Q, "input": "", "output": A},
        "fits no format: keys `instrucion`, `input`, `output`; nearest is alpaca",
        "did you mean `instruction`?",
    ),
    (
        {"conversation": []},
        "fits no format: keys `conversation`; nearest is sharegpt",
        "did you mean `conversations`?",
    ),
    (
        {"prompt": Q, "response": A},
        "fits no format: keys `prompt`, `response`; nearest is prompt-completion",
        "`completion`",
    ),
    (
        {"prompt": Q, "chosen": A},
        "fits no format: keys `prompt`, `chosen`; nearest is preference",
        "needs `rejected` too",
    ),
    (
        {"a": 1, "b": 2},
        "fits no format: keys `a`, `b`",
        "known are `preference-sharegpt`, `preference-alpaca`",
    ),
    (
        {"a\nb": 1, "\ud800": 2, "x" * 99: 3, **{f"k{n}": 0 for n in range(20)}},
        f"fits no format: keys `a\\nb`, `\\ud800`, `{'x' * 60}…`, "
        + ", ".join(f"`k{n}`" for n in range(17))
        + ", …",
        "known are",
    ),
    (
        {"messages": [{"role": "a\nb", "content": Q}]},
        f"`messages[0].role`: `a\\nb` is not one of {ROLES}",
        "mend",
    ),
    ({}, "fits no format: it has no keys", "see docs/data.md"),
    (
        {"instruction": Q, "inptu": "", "output": A},
        "`inptu` is not a key of `alpaca`",
        "did you mean `input`?",
    ),
    (
        {"instruction": Q, "output": A, "sytem": ""},
        "`sytem` is not a key of `alpaca`",
        "did you mean `system`?",
    ),
    (
        {"instruction": Q, "output": A, "Input": ""},
        "`Input` is not a key of `alpaca`",
        "did you mean `input`?",
    ),
    ({"messages": [], "tool": []}, "`tool` is not a key of `messages`", "did you mean `tools`?"),
    ({"messages": [], "lable": True}, "`lable` is not a key of `kto`", "did you mean `label`?"),
    (
        {"conversations": [], "choosen": {}, "rejected": {}},
        "`choosen` is not a key of `preference-sharegpt`",
        "did you mean `chosen`?",
    ),
    # values
    ({"instruction": Q, "output": 7}, "`output` is a number, not text", "mend or delete"),
    ({"instruction": 1.5, "output": A}, "`instruction` is a number, not text", "mend or delete"),
    ({"instruction": None, "output": A}, "`instruction` is null, not text", "mend or delete"),
    ({"instruction": Q, "input": ["a"], "output": A}, "`input` is a list, not text", "mend or delete"),
    ({"instruction": Q, "output": A, "system": {}}, "`system` is an object, not text", "mend or delete"),
    ({"instruction": Q, "output": A, "history": "a"}, "`history` is a string, not a list of pairs", "mend"),
    ({"instruction": Q, "output": A, "history": [["a"]]}, "`history[0]` is no pair of strings", "the answer"),
    ({"instruction": Q, "output": A, "history": [["a", None]]}, "`history[0][1]` is null, not text", "mend"),
    ({"messages": "a"}, "`messages` is a string, not a list of messages", "mend or delete"),
    ({"messages": None}, "`messages` is null, not a list of messages", "mend or delete"),
    ({"messages": [user(Q), A]}, "`messages[1]` is a string, not a message", "mend or delete"),
    (
        {"messages": [{"role": "usr", "content": Q}]},
        f"`messages[0].role`: `usr` is not one of {ROLES}",
        "mean `user`?",
    ),
    (
        {"messages": [{"role": "zebra", "content": Q}]},
        f"`messages[0].role`: `zebra` is not one of {ROLES}",
        "mend",
    ),
    (
        {"messages": [{"role": ["user"], "content": Q}]},
        "`messages[0].role` is a list, not a role",
        "mend or delete",
    ),
    (
        {"messages": [{"rolle": "user", "content": Q}]},
        "`messages[0]` has no `role`; there is `rolle`, `content`",
        "`role` by `rolle`?",
    ),
    (
        {"messages": [{"role": "user", "contnet": Q}]},
        "`messages[0]` has no `content`; there is `role`, `contnet`",
        "`contnet`?",
    ),
    ({"messages": [{}]}, "`messages[0]` has no `role`; there is nothing", "mend or delete"),
    ({"messages": [user(Q), assistant(None)]}, "`messages[1].content` is null, not text", "mend or delete"),  # type: ignore[arg-type]
    ({"messages": [user(7)]}, "`messages[0].content` is a number, not text", "mend or delete"),  # type: ignore[arg-type]
    ({"messages": [user([{"type": "image_url"}])]}, "`messages[0].content[0]` is no text part", "only text"),  # type: ignore[arg-type]
    ({"messages": [user([{"type": "text"}])]}, "`messages[0].content[0].text` is null, not text", "mend"),  # type: ignore[arg-type]
    (
        {"messages": [{**user(Q), "tool_calls": [call("f")]}]},
        "`messages[0]` has tool_calls, but its role is `user`",
        "only the assistant calls tools",
    ),
    (with_call(7), "`messages[0].tool_calls` is a number, not a list of calls", "mend or delete"),
    (with_call(["f"]), "`messages[0].tool_calls[0]` is no call of a function", CALL_LINE),
    (
        with_call([{"function": {"arguments": {}}}]),
        "`messages[0].tool_calls[0]` is no call of a function",
        CALL_LINE,
    ),
    (
        with_call([{"name": "f", "arguments": [1]}]),
        "`messages[0].tool_calls[0].arguments` is a list, not an object",
        "mend or delete",
    ),
    (
        with_call([{"name": "f", "arguments": "{"}]),
        "`messages[0].tool_calls[0].arguments` is not JSON (",
        "mend or delete",
    ),
    ({"messages": [user(Q), assistant(A)], "tools": 7}, "`tools` is a number, not a list of tools", "mend"),
    ({"messages": [user(Q), assistant(A)], "tools": "{"}, "`tools` is not JSON (", "mend or delete"),
    (
        {"messages": [user(Q), assistant(A)], "tools": "{}"},
        "`tools` is an object, not a list of tools",
        "mend",
    ),
    ({"messages": [user(Q), assistant(A)], "tools": [{}]}, "`tools[0]` is no function schema", TOOL_LINE),
    ({"conversations": [said("bot", Q)]}, f"`conversations[0].from`: `bot` is not one of {SENDERS}", "mend"),
    ({"conversations": [{"from": "human"}]}, "`conversations[0]` has no `value`; there is `from`", "mend"),
    ({"conversations": [said("gpt", None)]}, "`conversations[0].value` is null, not text", "mend"),  # type: ignore[arg-type]
    (called("add(1)"), "`conversations[0].value` is not JSON (expecting value, column 1)", "mend or delete"),
    (
        called('{"name": "f", "name": "g"}'),
        "`conversations[0].value` is not JSON (the key `name` is given twice)",
        "mend",
    ),
    (called('"f"'), "`conversations[0].value[0]` is no call of a function", CALL_LINE),
    (
        {"conversations": [said("system", "a"), said("human", Q)], "system": "b"},
        "`system` is given as a key and as a turn",
        "delete one of them",
    ),
    (
        {"prompt": Q, "completion": [assistant(A)]},
        "`prompt` is a string, but `completion` is a list",
        "two strings",
    ),
    (
        {"prompt": [user(Q)], "completion": A},
        "`prompt` is a list, but `completion` is a string",
        "two strings",
    ),
    ({"prompt": 7, "completion": A}, "`prompt` is a number, not text", "mend or delete"),
    ({"prompt": Q, "completion": 7}, "`completion` is a number, not text", "mend or delete"),
    ({"text": 7}, "`text` is a number, not text", "mend or delete"),
    ({"prompt": Q, "chosen": 7, "rejected": A}, "`chosen` is a number, neither text nor messages", "mend"),
    ({"prompt": None, "chosen": A, "rejected": B}, "`prompt` is null, neither text nor messages", "mend"),
    (
        {"chosen": A, "rejected": B},
        "`chosen` is a string that does not begin with `\\n\\nHuman: `",
        "without `prompt`, chosen and rejected are lists of messages or such transcripts",
    ),
    (
        {"chosen": "\n\nAssistant: a", "rejected": B},
        "`chosen` is a string that does not begin with `\\n\\nHuman: `",
        "transcripts",
    ),
    (
        {"messages": [user(Q), assistant(A)], "label": 1},
        "`label` is a number, not a boolean",
        "true or false",
    ),
    ({"prompt": Q, "completion": A, "label": "true"}, "`label` is a string, not a boolean", "true or false"),
    ({"prompt": Q, "completion": A, "label": None}, "`label` is null, not a boolean", "true or false"),
]


@pytest.mark.parametrize(("record", "message", "hint"), BAD)
def test_what_stops_the_reading(tmp_path, record, message, hint):
    raised = error(write(tmp_path, record))
    assert raised.message.startswith(f"{tmp_path}/data.jsonl:1: {message}")
    assert hint in (raised.hint or "")
    if not message.endswith("("):
        assert raised.message == f"{tmp_path}/data.jsonl:1: {message}"
