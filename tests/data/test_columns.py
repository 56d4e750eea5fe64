"""Columns under names of their own: those that are named, those that are well known, and those that are neither."""

from __future__ import annotations

import pytest

from llmctl.data.formats import FORMATS
from llmctl.data.shapes import Completion, Conversation, Preference, Text
from llmctl.errors import UserError
from llmctl.recipe.columns import ROLES
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import EvalRecipe
from llmctl.recipe.tune import DpoRecipe, SftRecipe
from tests.turns import assistant, error, read, system, user, write

Q, A, B = "How many?", "Four.", "Five."
TALK = Conversation([user(Q), assistant(A)])
PAIR = Preference([user(Q)], [assistant(A)], [assistant(B)])


def test_the_roles_are_the_keys_of_all_formats():
    keys = {key for format in FORMATS.values() for key in (*format.required, *format.optional)}
    assert set(ROLES) == keys | {"response"}


WELL_KNOWN = {
    "GSM8K": ({"question": Q, "answer": A}, TALK),
    "MetaMathQA": ({"query": Q, "response": A, "type": "x"}, TALK),
    "MATH": ({"problem": Q, "solution": A, "level": "1"}, TALK),
    "input-target": ({"input": Q, "target": A}, TALK),
    "input-output": ({"input": Q, "output": A}, TALK),
    "prompt-response": ({"prompt": Q, "response": A}, TALK),
    "Dolly": (
        {"instruction": Q, "context": "Two and two.", "response": A, "category": "qa"},
        Conversation([user(f"{Q}\n\nTwo and two."), assistant(A)]),
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "Be short.", "question": Q, "response": A},
        Conversation([system("Be short."), user(Q), assistant(A)]),
    ),
    "Orca pairs": (
        {"system": "Be short.", "question": Q, "chosen": A, "rejected": B},
        Preference([system("Be short."), user(Q)], [assistant(A)], [assistant(B)]),
    ),
    "query pairs": ({"query": Q, "chosen": A, "rejected": B}, PAIR),
}


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_well_known_names(name, tmp_path):
    record, shape = WELL_KNOWN[name]
    found, account = read(write(tmp_path, record, record))
    assert [one.shape for one in found] == [shape, shape]
    (note,) = [line for line in account.notes if "is read as" in line]
    assert note.endswith("(--columns names others)")


def test_the_account_says_which_mapping_was_taken(tmp_path):
    path = write(tmp_path, {"question": Q, "answer": A, "id": 7})
    assert read(path)[1].lines()[1:] == [
        f"{path}: `question` is read as the prompt, `answer` as the response (--columns names others)",
        f"{path}: not read: `id`",
    ]


MANY_WAYS = {
    "two prompts": {"question": Q, "query": Q, "answer": A},
    "two answers": {"question": Q, "answer": A, "solution": B},
    "a choice": {"question": Q, "choices": [A, B], "answer": "A"},
    "a label": {"question": Q, "answer": A, "label": True},
}


@pytest.mark.parametrize("name", MANY_WAYS)
def test_names_that_may_be_read_in_several_ways_are_not_guessed(name, tmp_path):
    path = write(tmp_path, MANY_WAYS[name])
    raised = error(path)
    assert "fits no format: keys `question`" in raised.message
    role = "completion" if "label" in MANY_WAYS[name] else "response"
    assert raised.hint is not None
    assert raised.hint.endswith(f"say which column is what, as --columns prompt=question,{role}=answer")
    columns = raised.hint.partition("--columns ")[2]
    settings = load_recipe(SftRecipe, None, {"data.columns": columns}, []).data.columns
    assert len(read(path, columns=settings)[0]) == 1, "what the hint says works"


UNKNOWN = {
    "a=b": ({"frage": Q, "antwort": A, "n": 1}, "prompt=frage,response=antwort"),
    "likely": (
        {"id": "7", "user_question": Q, "final_answer": A},
        "prompt=user_question,response=final_answer",
    ),
    "pairs": (
        {"q": Q, "better": A, "worse": B},
        "prompt=q,chosen=better,rejected=worse",
    ),
    "text": ({"content": Q}, "text=content"),
    "spaces": ({"the text": Q, "n": 1}, "'text=the text'"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_format_shows_its_columns_and_what_to_try(name, tmp_path):
    record, columns = UNKNOWN[name]
    path = write(tmp_path, record)
    raised = error(path)
    assert all(f"`{key}`" in raised.message for key in record)
    assert raised.hint == f"say which column is what, as --columns {columns}"
    settings = load_recipe(SftRecipe, None, {"data.columns": columns.strip("'")}, []).data.columns
    (found,) = read(path, columns=settings)[0]
    assert isinstance(found.shape, Conversation | Preference | Text)


def test_a_format_of_which_a_key_is_missing(tmp_path):
    raised = error(write(tmp_path, {"instruction": Q, "reply": A}))
    assert raised.hint == (
        "alpaca needs `output` too, or say which column is what, as --columns prompt=instruction,response=reply"
    )


MAPPED = {
    "prompt=q,response=a": ({"q": Q, "a": A}, TALK),
    "instruction=q,output=a,system=s": (
        {"q": Q, "a": A, "s": "Be short."},
        Conversation([system("Be short."), user(Q), assistant(A)]),
    ),
    "prompt=q,completion=a": ({"q": Q, "a": A}, Completion(Q, A)),
    "prompt=q,chosen=a,rejected=b": ({"q": Q, "a": A, "b": B}, PAIR),
    "prompt=q": ({"q": Q, "chosen": A, "rejected": B}, PAIR),
    "messages=turns": ({"turns": [user(Q), assistant(A)]}, TALK),
    "text=body": ({"body": Q}, Text(Q)),
    # a column that is called as a role and has none is left out
    "prompt=output,response=prompt": ({"output": Q, "prompt": A, "instruction": B}, TALK),
}


@pytest.mark.parametrize("columns", MAPPED)
def test_named_columns(columns, tmp_path):
    record, shape = MAPPED[columns]
    settings = load_recipe(SftRecipe, None, {"data.columns": columns}, []).data.columns
    found, account = read(write(tmp_path, record), columns=settings)
    assert [one.shape for one in found] == [shape]
    unread = [line for line in account.notes if "not read" in line]
    assert len(unread) == ("instruction" in record)


def test_a_column_that_is_not_there(tmp_path):
    path = write(tmp_path, {"question": Q, "answer": A}, {"question": Q, "anwser": A})
    raised = error(path)
    assert raised.message == (
        f"{path}:2: no column `answer`, which is the response; there is `question`, `anwser`"
    )
    assert raised.hint == "did you mean response=anwser?"
    raised = error(path, columns={"prompt": "x", "response": "answer"})
    assert raised.message.startswith(f"{path}:1: no column `x`, which is the prompt; there is `question`")


def test_a_column_that_a_record_may_lack(tmp_path):
    path = write(tmp_path, {"q": Q, "a": A}, {"q": Q, "a": A, "s": "Be short."})
    columns = {"prompt": "q", "response": "a", "system": "s"}
    assert [len(one.shape.messages) for one in read(path, columns=columns)[0]] == [2, 3]
    _, account = read(path, columns=columns | {"system": "sys"})
    assert f"{path}: no record has the column `sys`" in account.notes


def test_a_wrong_value_is_told_by_its_column(tmp_path):
    path = write(tmp_path, {"question": Q, "answer": 4})
    assert error(path).message == (
        f"{path}:1: `output` is a number, not text; `output` is read from the column `answer`"
    )


WRONG = {
    "promt=q": ("`promt` is not a role", "did you mean `prompt`?"),
    "prompt": (
        "`prompt` is not of the form ROLE=COLUMN",
        "write it as --columns prompt=question,response=answer",
    ),
    "prompt=a,prompt=b": ("the role `prompt` is given twice", "give each role one column"),
    "prompt=a,response=a": ("the column `a` has two roles", "give each column one role"),
    "prompt=a,instruction=b": ("`prompt` and `instruction` are one role", "keep one: prompt=COLUMN"),
}


@pytest.mark.parametrize("columns", WRONG)
def test_wrong_mappings(columns):
    message, hint = WRONG[columns]
    with pytest.raises(UserError) as caught:
        load_recipe(DpoRecipe, None, {"data.columns": columns}, [])
    assert caught.value.message == f"command line: data.columns: {message}"
    assert caught.value.hint == hint


def test_a_mapping_in_a_recipe_file(tmp_path):
    (tmp_path / "r.yaml").write_text("stage: sft\ndata:\n  columns: {prompt: 'my, question', response: a}\n")
    recipe = load_recipe(SftRecipe, str(tmp_path / "r.yaml"), {}, [])
    assert recipe.data.columns == {"prompt": "my, question", "response": "a"}
    assert (
        load_recipe(SftRecipe, None, {}, ["data.columns=prompt=q,response=a"]).data.columns["prompt"] == "q"
    )


@pytest.mark.parametrize(
    ("kind", "words", "message", "hint"),
    [
        (SftRecipe, ["data.columns=text=a", "data.text_field=b"], "both say", "set data.columns alone"),
        (EvalRecipe, ["eval.columns=prompt=a,response=b"], "`columns` is for answers", "add --answers"),
    ],
)
def test_mappings_that_would_not_be_used(kind, words, message, hint):
    with pytest.raises(UserError) as caught:
        load_recipe(kind, None, {}, words)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
