"""What is counted of a data set, against figures worked out by hand."""

from __future__ import annotations

import statistics as plain
from pathlib import Path
from typing import Any

import pytest

from llmctl.data.formats import Account, examples
from llmctl.data.statistics import Spread, Statistics, empty_inputs, script
from tests.turns import assistant, call, system, tool, user, write


def count(*paths: Path) -> dict[str, Any]:
    made = Statistics()
    for example in examples(paths, "text", Account(noun="record")):
        made.add(example)
    return made.report() | {"empty_inputs": empty_inputs(made.sources)}


def test_spread_is_the_nearest_rank() -> None:
    spread = Spread()
    for value in [5, 1, 4, 2, 3, 100, 7, 6, 8, 9]:
        spread.add(value)
    assert spread.summary() == {"count": 10, "min": 1, "median": 5, "p95": 100, "max": 100, "total": 145}
    assert Spread().summary() == {"count": 0}


def test_spread_of_many_is_near_what_python_finds() -> None:
    values = [(17 * n) % 1009 for n in range(1000)]
    spread = Spread()
    for value in values:
        spread.add(value)
    found = spread.summary()
    assert found["median"] == plain.median_low(values)
    assert found["p95"] == sorted(values)[949]


def test_conversations(tmp_path: Path) -> None:
    weather = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    path = write(
        tmp_path,
        {"messages": [system("Be kind."), user("Hi"), assistant("Hello")]},
        {
            "messages": [
                system("Be kind."),
                user("Été?"),
                assistant("", call("weather", at="Ux")),
                tool("12"),
                assistant("12°"),
            ],
            "tools": weather,
        },
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
    )
    found = count(path)
    assert (found["records"], found["formats"]) == (3, {"messages": 3})
    assert found["turns"] == {"count": 3, "min": 2, "median": 4, "p95": 4, "max": 4, "total": 10}
    assert found["system_prompts"] == {"records": 2, "distinct": 1}
    assert found["tools"] == {"records_with_tools": 1, "records_with_calls": 1, "calls": 1}
    roles = found["roles"]
    assert list(roles) == ["system", "user", "assistant", "tool"]
    assert roles["user"]["characters"] == {"count": 4, "min": 1, "median": 1, "p95": 4, "max": 4, "total": 8}
    assert roles["user"]["bytes"]["max"] == 6, "É and é take two bytes each"
    called = '{"name": "weather", "arguments": {"at": "Ux"}}'
    assert roles["assistant"]["characters"]["max"] == len(called)
    assert roles["assistant"]["characters"]["count"] == 5
    assert found["preferences"] is None
    assert found["empty_inputs"] is None


def test_repeats_are_those_that_differ_in_white_space_only(tmp_path: Path) -> None:
    def pair(question: str, answer: str) -> dict[str, str]:
        return {"prompt": question, "completion": answer}

    first = write(
        tmp_path,
        pair("one  two", "three"),
        pair("one two three", ""),  # dropped
        pair("one", "two three"),  # the same words, but another answer
        pair("one\ntwo ", "\tthree"),
        pair("one two", "Three"),
    )
    second = write(tmp_path, pair("one two", "three"), name="second.jsonl")
    found = count(first, second)
    assert found["duplicates"] == {
        "records": 2,
        "places": [
            {"place": f"{first}:4", "first": f"{first}:1"},
            {"place": f"{second}:1", "first": f"{first}:1"},
        ],
    }


def test_repeats_tell_tools_and_labels_apart(tmp_path: Path) -> None:
    turns = [user("a"), assistant("b")]
    tools = [{"name": "f"}]
    talks = write(tmp_path, {"messages": turns}, {"messages": turns, "tools": tools}, name="talks.jsonl")
    labelled = write(
        tmp_path, *({"messages": turns, "label": label} for label in (True, False)), name="labelled.jsonl"
    )
    assert count(talks, labelled)["duplicates"]["records"] == 0


def test_a_repeat_on_one_line_is_named_with_its_column(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text('[{"text": "a b"}, {"text": "c"}, {"text": "a  b"}]')
    (place,) = count(path)["duplicates"]["places"]
    assert place == {"place": f"{path}:1:34", "first": f"{path}:1"}


def test_only_the_first_places_of_repeats_are_kept(tmp_path: Path) -> None:
    found = count(write(tmp_path, *[{"text": "again"}] * 9))["duplicates"]
    assert found["records"] == 8
    assert [place["place"].rpartition(":")[2] for place in found["places"]] == ["2", "3", "4", "5", "6"]


SCRIPT = {
    "a": "Latin",
    "é": "Latin",
    "Ａ": "Latin",
    "中": "Han",
    "々": "Han",
    "ひ": "Kana",
    "カ": "Kana",
    "ｶ": "Kana",
    "ー": "Kana",
    "한": "Hangul",
    "ж": "Cyrillic",
    "ω": "Greek",
    "ع": "Arabic",
    "ह": "Devanagari",
    "ก": "Thai",
    "א": "Hebrew",
    "µ": "Other",
    "ʰ": "Other",
    "7": None,
    " ": None,
    "。": None,
    "\U0001f600": None,
}


@pytest.mark.parametrize("letter", SCRIPT)
def test_script_of_a_letter(letter: str) -> None:
    assert script(letter) == SCRIPT[letter]


def test_scripts_of_records(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "abc 中"}, {"text": "中文，中文 ok"}, {"text": "12 + 3"})
    assert count(path)["scripts"] == {
        "Latin": {"letters": 0.5, "records": 1},
        "Han": {"letters": 0.5, "records": 1},
        "none": {"letters": 0.0, "records": 1},
    }


def test_preferences(tmp_path: Path) -> None:
    pairs = [("long answer", "short"), ("a", "bb"), ("c", "dd"), ("ee", "ff"), ("g", "g")]
    path = write(tmp_path, *({"prompt": "?", "chosen": good, "rejected": bad} for good, bad in pairs))
    found = count(path)
    assert found["records"] == 4, "equal answers are no preference"
    assert found["preferences"] == {
        "pairs": 4,
        "longer_chosen": 0.25,
        "shorter_chosen": 0.5,
        "same_length": 0.25,
        "length_baseline": 0.625,  # always the shorter one: two right, and half of the tie
    }
    assert found["roles"]["chosen"]["characters"]["max"] == 11
    assert found["roles"]["rejected"]["characters"]["total"] == 5 + 2 + 2 + 2
    assert found["turns"]["max"] == 2


def test_labelled_answers(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": "?", "completion": "x" * n, "label": n > 2} for n in (1, 2, 3)))
    roles = count(path)["roles"]
    assert (roles["wanted"]["characters"]["count"], roles["unwanted"]["characters"]["total"]) == (1, 3)


def test_empty_inputs(tmp_path: Path) -> None:
    def record(**more: object) -> dict[str, object]:
        return {"instruction": "a", "output": "b", **more}

    path = write(
        tmp_path, record(input=""), record(input=" "), record(input=None), record(), record(input="c")
    )
    texts = write(tmp_path, {"text": "a"}, name="texts.jsonl")
    assert count(path, texts)["empty_inputs"] == {"records": 4, "of": 5}


def test_texts_have_no_turns(tmp_path: Path) -> None:
    found = count(write(tmp_path, {"text": "a"}))
    assert [found[name] for name in ("turns", "system_prompts", "tools")] == [None, None, None]
