"""Each format: what a record of it becomes, and what is dropped with which reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmctl.data.formats import FORMATS, Completion, Conversation, Example, Labelled, Preference, Text
from tests.turns import assistant, call, error, read, said, system, tool, user, write

SCHEMA = {"name": "add", "description": "a sum", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
Q, A, B = "What is it?", "This.", "That."
ASKED = [said("human", Q)]
HH = "\n\nHuman: hi\n\nAssistant: Yes?\n\nHuman: {}\n\nAssistant: {}"


def written(arguments: Any, **more: str) -> dict[str, Any]:
    """A call of `add` with arguments as they stand in the record."""
    return {**more, "type": "function", "function": {"name": "add", "arguments": arguments}}


GOOD: list[tuple[str, dict[str, Any], Any]] = [
    ("alpaca", {"instruction": Q, "output": A}, Conversation([user(Q), assistant(A)])),
    ("alpaca", {"instruction": Q, "input": "", "output": A}, Conversation([user(Q), assistant(A)])),
    (
        "alpaca",
        {"instruction": Q, "input": " in", "output": A},
        Conversation([user(f"{Q}\n\n in"), assistant(A)]),
    ),
    (
        "alpaca",
        {"instruction": "", "input": "in", "output": " a\n"},
        Conversation([user("in"), assistant(" a\n")]),
    ),
    (
        "alpaca",
        {"instruction": Q, "output": A, "system": "Be.", "history": [["a", "b"], ["c", "d"]], "input": None},
        Conversation(
            [system("Be."), user("a"), assistant("b"), user("c"), assistant("d"), user(Q), assistant(A)]
        ),
    ),
    (
        "alpaca",
        {"instruction": Q, "output": A, "system": " ", "history": []},
        Conversation([user(Q), assistant(A)]),
    ),
    ("messages", {"messages": [user(Q), assistant(A)]}, Conversation([user(Q), assistant(A)])),
    (
        "messages",
        {"messages": [{"role": "developer", "content": "Be."}, user(Q), assistant(A), user("")], "tools": []},
        Conversation([system("Be."), user(Q), assistant(A), user("")]),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
                        {"name": "add"},
                    ],
                },
                {"role": "function", "content": "2", "name": "add", "tool_call_id": "1"},
                {"role": "assistant", "content": A, "tool_calls": None},
            ],
            "tools": [*TOOLS, SCHEMA],
        },
        Conversation(
            [
                user("ab"),
                # null is as good as absent, and arguments stay what they were: the template says what it can read
                {"role": "assistant", "tool_calls": [written('{"x": 1}', id="1"), written({})]},
                {**tool("2"), "name": "add", "tool_call_id": "1"},
                assistant(A),
            ],
            TOOLS * 2,
        ),
    ),
    (
        "sharegpt",
        {"conversations": [said("system", "Be."), said("human", Q), said("gpt", A)], "tools": "[]"},
        Conversation([system("Be."), user(Q), assistant(A)]),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                said("user", Q),
                said("function_call", '{"name": "add", "arguments": {"x": [1]}}'),
                said("observation", '{"sum": 1}'),
                said(
                    "function_call", '[{"name": "add", "arguments": "{}"}, {"name": "add", "arguments": {}}]'
                ),
                said("function", "1"),
                said("tool", "2"),
                said("assistant", A),
            ],
            "system": "Be.",
            "tools": json.dumps([SCHEMA]),
        },
        Conversation(
            [
                system("Be."),
                user(Q),
                assistant("", call("add", x=[1])),
                tool('{"sum": 1}'),
                assistant("", written("{}"), written({})),
                tool("1"),
                tool("2"),
                assistant(A),
            ],
            TOOLS,
        ),
    ),
    (
        "sharegpt",
        {"conversations": [said("system", "Be."), said("human", Q), said("gpt", A)], "system": "Be."},
        Conversation([system("Be."), user(Q), assistant(A)]),
    ),
    ("sharegpt", {"conversations": [user(Q), assistant(A)]}, Conversation([user(Q), assistant(A)])),
    ("prompt-completion", {"prompt": "a ", "completion": " b"}, Completion("a ", " b")),
    ("prompt-completion", {"prompt": "", "completion": "b"}, Completion("", "b")),
    (
        "prompt-completion",
        {"prompt": [user(Q)], "completion": [assistant(A)], "tools": TOOLS},
        Conversation([user(Q), assistant(A)], TOOLS),
    ),
    ("text", {"text": " a\n"}, Text(" a\n")),
    (
        "preference",
        {"prompt": Q, "chosen": A, "rejected": B},
        Preference([user(Q)], [assistant(A)], [assistant(B)]),
    ),
    (
        "preference",
        {
            "prompt": [system("Be."), user(Q)],
            "chosen": [assistant(A)],
            "rejected": assistant(B),
            "tools": [SCHEMA],
        },
        Preference([system("Be."), user(Q)], [assistant(A)], [assistant(B)], TOOLS),
    ),
    (
        "preference",
        {"prompt": user(Q), "chosen": [assistant(A), user("?"), assistant(B)], "rejected": B},
        Preference([user(Q)], [assistant(A), user("?"), assistant(B)], [assistant(B)]),
    ),
    (
        "preference",  # the prompt stands once more before the answers
        {"prompt": Q, "chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        Preference([user(Q)], [assistant(A)], [assistant(B)]),
    ),
    (
        "preference-implicit",
        {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        Preference([user(Q)], [assistant(A)], [assistant(B)]),
    ),
    (
        "preference-implicit",
        {"chosen": HH.format("x", A), "rejected": HH.format("x", B)},
        Preference([user("hi"), assistant("Yes?"), user("x")], [assistant(A)], [assistant(B)]),
    ),
    (
        "preference-implicit",  # they part at a turn of the user: the prompt ends before
        {"chosen": HH.format("x", A), "rejected": HH.format("y", B)},
        Preference(
            [user("hi")],
            [assistant("Yes?"), user("x"), assistant(A)],
            [assistant("Yes?"), user("y"), assistant(B)],
        ),
    ),
    (
        "preference-implicit",
        {
            "chosen": "\n\nHuman: a\n\nb: c \n\nAssistant:  d",
            "rejected": "\n\nHuman: a\n\nb: c \n\nAssistant:e",
        },
        Preference([user("a\n\nb: c ")], [assistant(" d")], [assistant("e")]),
    ),
    (
        "preference-sharegpt",
        {"conversations": ASKED, "chosen": said("gpt", A), "rejected": [said("gpt", B)], "system": "Be."},
        Preference([system("Be."), user(Q)], [assistant(A)], [assistant(B)]),
    ),
    (
        "preference-alpaca",
        {"instruction": Q, "input": "in", "history": [["a", "b"]], "chosen": A, "rejected": B},
        Preference([user("a"), assistant("b"), user(f"{Q}\n\nin")], [assistant(A)], [assistant(B)]),
    ),
    (
        "kto",
        {"messages": [user("a"), assistant("b"), user(Q), assistant(A)], "label": False},
        Labelled([user("a"), assistant("b"), user(Q)], [assistant(A)], False),
    ),
    (
        "kto-completion",
        {"prompt": Q, "completion": A, "label": True},
        Labelled([user(Q)], [assistant(A)], True),
    ),
    (
        "kto-completion",
        {"prompt": [user(Q)], "completion": [assistant(A)], "label": True, "tools": TOOLS},
        Labelled([user(Q)], [assistant(A)], True, TOOLS),
    ),
]


@pytest.mark.parametrize(("format", "record", "shape"), GOOD)
def test_what_a_record_becomes(tmp_path, format, record, shape):
    path = write(tmp_path, record)
    found, account = read(path)
    assert found == [Example(shape, format, str(path), 1)]
    assert account.lines() == ["read 1 record, kept 1"]


def test_every_format_has_a_case():
    assert {format for format, _, _ in GOOD} == set(FORMATS)


def test_every_format_is_told_by_its_own_keys():
    """A record with the keys of two formats is the one that stands first, so that must ask for more."""
    names = list(FORMATS)
    for at, name in enumerate(names):
        for earlier in names[:at]:
            assert not set(FORMATS[earlier].required) <= set(FORMATS[name].required), (earlier, name)


DROPPED: list[tuple[dict[str, Any], str]] = [
    ({"instruction": Q, "output": ""}, "the answer is empty"),
    ({"instruction": Q, "output": " \n"}, "the answer is empty"),
    ({"instruction": Q, "output": None}, "the answer is null"),
    ({"instruction": " ", "input": "", "output": A}, "the prompt is empty"),
    ({"messages": [user(Q)]}, "no assistant turn in it"),
    ({"messages": []}, "no assistant turn in it"),
    ({"messages": [user(Q), assistant("")]}, "the answer is empty"),
    ({"messages": [user(Q), assistant(" "), user(Q), assistant(A)]}, "the answer is empty"),
    ({"conversations": [said("human", Q)]}, "no assistant turn in it"),
    ({"conversations": [said("human", Q), said("gpt", "")]}, "the answer is empty"),
    ({"prompt": Q, "completion": ""}, "the answer is empty"),
    ({"prompt": Q, "completion": None}, "the answer is null"),
    ({"prompt": [user(Q)], "completion": []}, "no assistant turn in it"),
    ({"text": ""}, "no text in it"),
    ({"text": None}, "the text is null"),
    ({"text": "\ud800"}, "half a surrogate pair, which is not text"),
    ({"prompt": "\udfff", "completion": A}, "half a surrogate pair, which is not text"),
    ({"instruction": Q, "output": "é \ud83d"}, "half a surrogate pair, which is not text"),
    (
        {"messages": [user(Q), assistant("", call("f", x="\ud800"))]},
        "half a surrogate pair, which is not text",
    ),
    (
        {"messages": [user(Q), assistant(A)], "tools": [{"name": "f", "description": "\ud800"}]},
        "half a surrogate pair, which is not text",
    ),
    ({"prompt": Q, "chosen": A, "rejected": "\ud800"}, "half a surrogate pair, which is not text"),
    ({"prompt": Q, "completion": "\ud800", "label": True}, "half a surrogate pair, which is not text"),
    ({"prompt": Q, "chosen": A, "rejected": A}, "chosen and rejected are equal"),
    ({"prompt": Q, "chosen": "", "rejected": A}, "chosen is empty"),
    ({"prompt": Q, "chosen": A, "rejected": " "}, "rejected is empty"),
    ({"prompt": Q, "chosen": None, "rejected": A}, "chosen is null"),
    ({"prompt": Q, "chosen": A, "rejected": None}, "rejected is null"),
    ({"prompt": Q, "chosen": [assistant("")], "rejected": A}, "chosen is empty"),
    ({"prompt": " ", "chosen": A, "rejected": B}, "the prompt is empty"),
    ({"prompt": [], "chosen": A, "rejected": B}, "the prompt is empty"),
    (
        {"prompt": [user(Q), assistant(A)], "chosen": A, "rejected": B},
        "the prompt ends with an assistant turn",
    ),
    (
        {"prompt": Q, "chosen": [user("?"), assistant(A)], "rejected": B},
        "chosen does not begin with an assistant turn",
    ),
    (
        {"prompt": Q, "chosen": [assistant(A), user(Q)], "rejected": B},
        "chosen does not end with an assistant turn",
    ),
    (
        {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(A)]},
        "chosen and rejected are equal",
    ),
    (
        {"chosen": [user("a"), assistant(A)], "rejected": [user("b"), assistant(A)]},
        "chosen and rejected have no prompt in common",
    ),
    ({"chosen": "", "rejected": HH.format(Q, A)}, "chosen and rejected have no prompt in common"),
    ({"chosen": HH.format(Q, A), "rejected": None}, "rejected is null"),
    ({"chosen": HH.format(Q, ""), "rejected": HH.format(Q, A)}, "chosen is empty"),
    ({"chosen": HH.format(Q, A), "rejected": HH.format(Q, A)[: -len(A) - 13]}, "rejected is empty"),
    (
        {"conversations": ASKED, "chosen": said("gpt", A), "rejected": said("gpt", A)},
        "chosen and rejected are equal",
    ),
    ({"conversations": [], "chosen": said("gpt", A), "rejected": said("gpt", B)}, "the prompt is empty"),
    ({"instruction": Q, "chosen": A, "rejected": ""}, "rejected is empty"),
    ({"messages": [assistant(A)], "label": True}, "the prompt is empty"),
    ({"messages": [user(Q)], "label": True}, "the answer does not begin with an assistant turn"),
    ({"messages": [user(Q), assistant("")], "label": True}, "the answer is empty"),
    ({"prompt": Q, "completion": "", "label": True}, "the answer is empty"),
    ({"prompt": "", "completion": A, "label": True}, "the prompt is empty"),
]


@pytest.mark.parametrize(("record", "reason"), DROPPED)
def test_what_is_dropped(tmp_path, record, reason):
    raised = error(write(tmp_path, record))
    assert raised.message == f"{tmp_path}/data.jsonl: no usable record (dropped 1: {reason})"

    good = next(r for f, r, _ in GOOD if set(FORMATS[f].required) == set(record) - {"input", "tools"})
    found, account = read(write(tmp_path, good, record, good))
    assert [e.line for e in found] == [1, 3]
    assert account.dropped == {reason: [f"{tmp_path}/data.jsonl:2"]}
    assert account.lines()[0] == "read 3 records, kept 2"
