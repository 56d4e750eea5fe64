"""Files of records: which format a file has, what is noted, what stops the reading."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.data.builtin import BUILTIN_RECORDS
from llmctl.data.document import Account
from llmctl.data.formats import FORMATS, Conversation, Preference, Text, examples, slip
from llmctl.errors import UserError
from tests.turns import assistant, call, error, read, user, write

Q, A, B = "What is it?", "This.", "That."


@pytest.mark.parametrize(
    ("second", "message", "hint"),
    [
        (
            {"prompt": Q, "completion": A},
            "mixed formats: this record is `prompt-completion`, line 1 is `alpaca`",
            "a file holds one format: put them in files of their own",
        ),
        (
            {"instruction": Q, "chosen": A, "rejected": B},
            "mixed formats: this record is `preference-alpaca`, line 1 is `alpaca`",
            "a file holds one format",
        ),
        (
            {"instruction": Q, "outpt": A},
            "fits no format: keys `instruction`, `outpt`; nearest is alpaca; line 1 is `alpaca`",
            "did you mean `output`?",
        ),
        ({"instruction": Q, "output": A, "histroy": []}, "`histroy` is not a key of `alpaca`", "`history`?"),
    ],
)
def test_the_first_record_decides_the_format(tmp_path, second, message, hint):
    path = write(tmp_path, {"instruction": Q, "output": A}, second)
    raised = error(path)
    assert raised.message == f"{path}:2: {message}"
    assert hint in (raised.hint or "")


def test_the_page_has_a_row_for_each_format():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (`.+?) \|", page, re.MULTILINE))
    for name, format in FORMATS.items():
        keys, _, optional = rows[name].partition("(")
        assert set(format.required) <= set(re.findall(r"`(\w+)`", keys))
        assert set(format.optional) <= set(re.findall(r"`(\w+)`", optional))
    for name in BUILTIN_RECORDS:
        assert f"`builtin:{name}`" in page


def test_each_file_has_its_own_format(tmp_path):
    write(tmp_path, {"instruction": Q, "output": A}, name="a.jsonl")
    write(tmp_path, {"text": A}, name="b.jsonl")
    (tmp_path / "c.txt").write_text("words")
    found, _ = read(tmp_path)
    assert [(e.format, e.shape) for e in found][1:] == [("text", Text(A)), ("text", Text("words"))]


def test_records_may_lack_optional_keys_and_have_them_in_any_order(tmp_path):
    path = write(tmp_path, {"instruction": Q, "output": A}, {"output": A, "input": "in", "instruction": Q})
    assert [e.shape.messages[0]["content"] for e in read(path)[0]] == [Q, f"{Q}\n\nin"]


def test_a_turn_that_is_not_to_be_trained_is_refused(tmp_path):
    write(tmp_path, {"messages": [user(Q), {**assistant(A), "weight": 0}]}, name="a.jsonl")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert caught.value.message.endswith("`messages[1]` has weight 0, but every assistant turn is trained")
    assert caught.value.hint == "leave such records out"


def test_an_empty_turn_in_a_history_drops_the_record(tmp_path):
    record = {"instruction": Q, "output": A, "history": [[Q, A], [Q, " "]]}
    write(tmp_path, record, {"instruction": Q, "output": A}, name="a.jsonl")
    _, account = read(tmp_path)
    assert (account.kept, account.counts) == (1, {"an empty assistant turn in its history": 1})


def test_columns_that_are_not_read_are_said_once_a_file(tmp_path):
    turn = {**assistant(A), "weight": 1, "extra": None}
    a = write(
        tmp_path, *[{"messages": [user(Q), turn], "id": n, "source": "x"} for n in range(3)], name="a.jsonl"
    )
    b = write(tmp_path, {"instruction": Q, "output": A, "text": Q, "messages_id": 1}, name="b.jsonl")
    found, account = read(tmp_path)
    # a chat template may read any key of a message: whether it does is told where it is known
    assert found[0].shape == Conversation([user(Q), {**assistant(A), "weight": 1}])
    assert account.lines() == [
        "read 4 records, kept 4",
        f"{a}: not read: `id`, `source`",
        f"{b}: not read: `messages_id`, `text`",
    ]
    assert Account(**account.to_json()) == account


def test_new_keys_in_every_record_are_not_remembered_for_ever(tmp_path):
    path = write(tmp_path, *[{"text": A, f"key{n:04}": 1} for n in range(2_000)])
    _, account = read(path)
    assert account.kept == 2_000
    names = ", ".join(f"`key{n:04}`" for n in range(20))
    assert account.notes == [f"{path}: not read: {names}, …"]


def test_the_text_field(tmp_path):
    record = {"instruction": Q, "output": A, "body": "b"}
    path = write(tmp_path, record)
    assert read(path)[0][0].format == "alpaca"
    assert read(path, "body")[0][0].shape == Text("b")
    (tmp_path / "a.txt").write_text("words")
    assert read(tmp_path / "a.txt", "body")[0][0].shape == Text("words")
    raised = error(write(tmp_path, {"bdoy": "b"}), "body")
    assert raised.message.endswith("fits no format: keys `bdoy`; nearest is text")
    assert raised.hint == "did you mean `body`?"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", "[]", "no usable record (it holds none)"),
        ("a.jsonl", "\n", "no usable record (it holds none)"),
        ("a.csv", "instruction,output\n", "no usable record (it holds none)"),
        ("a.txt", " \n", "no usable record (dropped 1: no text in it)"),
        (
            "a.csv",
            "instruction,output\na,\n,b\nc,\n",
            "no usable record (dropped 2: the answer is empty; dropped 1: the prompt is empty)",
        ),
    ],
)
def test_a_file_without_any_usable_record(tmp_path, name, data, message):
    write(tmp_path, {"text": A}, {"text": ""}, name="0.jsonl")
    (tmp_path / name).write_text(data)
    raised = error(tmp_path)
    assert raised.message == f"{tmp_path / name}: {message}"
    assert raised.hint == "mend the file, or leave it out"


def test_csv_and_parquet(tmp_path):
    csv = tmp_path / "a.csv"
    csv.write_text('instruction,input,output\nWhat?,,"a, b"\n')
    assert read(csv)[0][0].shape == Conversation([user("What?"), assistant("a, b")])
    csv.write_text("prompt,completion,label\na,b,true\n")
    raised = error(csv)
    assert raised.message == f"{csv}:2: `label` is a string, not a boolean"
    assert raised.hint == "write true or false; csv holds only strings"

    path = tmp_path / "a.parquet"
    turns = [
        [user(Q), {**assistant("", call("f", x=1)), "name": None}],
        [user(Q), {**assistant(A), "tool_calls": None}],
    ]
    pq.write_table(pa.table({"messages": turns, "tools": pa.array(["[]", None])}), path)
    shapes = [e.shape for e in read(path)[0]]
    assert shapes == [
        Conversation([user(Q), assistant("", call("f", x=1))]),
        Conversation([user(Q), assistant(A)]),
    ]


@pytest.mark.parametrize(
    ("name", "format", "shape"),
    [
        ("tinyworld-instructions", "alpaca", Conversation),
        ("tinyworld-instructions-heldout", "alpaca", Conversation),
        ("tinyworld-preferences", "preference", Preference),
        ("tinyworld-preferences-heldout", "preference", Preference),
    ],
)
def test_builtins(name, format, shape):
    found, account = read(f"builtin:{name}")
    assert {(e.format, type(e.shape)) for e in found} == {(format, shape)}
    assert not account.counts and not account.notes


def test_a_kept_record_may_be_dropped_after_all():
    account = Account(noun="record")
    account.keep()
    account.keep()
    account.reject("too long", "a:2")
    assert account.lines() == ["read 2 records, kept 1", "dropped 1: too long (a:2)"]


@pytest.mark.parametrize(
    ("written", "meant", "is_slip"),
    [
        ("inptu", "input", True),
        ("inputs", "input", True),
        ("Input", "input", True),
        ("sytem", "system", True),
        ("converstaion", "conversations", True),
        ("story", "history", False),
        ("topics", "tools", False),
        ("id", "input", False),
        ("system_prompt", "system", False),
        ("level", "label", False),
    ],
)
def test_slip(written, meant, is_slip):
    assert slip(written, meant) is is_slip


KEYS = sorted({key for format in FORMATS.values() for key in (*format.required, *format.optional)})
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
TURN = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.text(max_size=3),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(st.sampled_from(KEYS), ANY | st.lists(TURN, max_size=4) | st.text(max_size=9)))
def test_any_record_is_kept_dropped_or_an_error_with_its_place(tmp_path, record):
    path = write(tmp_path, record, {"x": 1})
    account = Account(noun="record")
    with pytest.raises(UserError) as caught:
        list(examples([path], "text", account))
    assert caught.value.message.startswith(f"{path}")
    assert account.read == account.kept + sum(account.counts.values())
    assert account.read <= 1
