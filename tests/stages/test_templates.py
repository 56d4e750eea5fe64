"""Records through the chat templates that people have: the rows of `llmctl data inspect` are those of transformers.

The table of docs/data.md is made by docs/templates.py, whose cells raise where a row is another one.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llmctl.recipe.tune import SftData
from llmctl.stages.remarks import OF_ANSWERS, UNTRAINABLE
from llmctl.stages.rows import talk_rows
from llmctl.talk import SILENT
from llmctl.tokenizer.answers import EMPTY, REWRITTEN, UNPROMPTED
from llmctl.tokenizer.twins import shipped
from tests.program import Program
from tests.tokenizer import reasoning
from tests.turns import assistant, said, user, write

ROOT = Path(__file__).resolve().parents[2]
# one of each kind of cell, the shorter ones
QUICK = (
    "cohere", "deepseekv3", "gemma4_v5", "glm4moe", "gptoss", "idefics3", "llava_next", "phi3_5_training", "qwen2_5_training",
    "qwen3", "qwen3_5_think",
)  # fmt: skip


def _script() -> ModuleType:
    """docs/templates.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("templates", ROOT / "docs" / "templates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def model(folder: Path, template: str) -> PreTrainedTokenizerFast:
    """A folder `model` with a tokenizer that has `<think>` as a special token, and what is read of a model beside it."""
    tokenizer = reasoning.thinking(template)
    SCRIPT.save_model(tokenizer, folder / "model")
    return tokenizer


def inspected(llmctl: Program, *words: str) -> dict[str, Any]:
    ended = llmctl("data", "inspect", "data.jsonl", "--model", "model", "--json", *words)
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def answers_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The trained parts of a row, as text."""
    parts: list[list[int]] = [[]]
    for token, trained in zip(row["ids"], row["trained"], strict=True):
        if trained:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [tokenizer.decode(part) for part in parts if part]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
THOUGHT = {"role": "assistant", "reasoning_content": "They greet me.", "content": "Hello"}
# template, record, messages as transformers reads them, what is trained, what is said
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]] | None, list[str], str | None]] = {
    "reasoning in a key of its own": (
        reasoning.THINKING,
        {"messages": [user("Hi"), THOUGHT]},
        None,
        ["<think>\nThey greet me.\n</think>\n\nHello<|im_end|>"],
        None,
    ),
    "reasoning and nothing else": (
        reasoning.THINKING,
        {"messages": [user("Hi"), {**THOUGHT, "content": None}]},
        None,
        ["<think>\nThey greet me.\n</think>\n\n<|im_end|>"],
        None,
    ),
    "reasoning of a sharegpt record": (
        reasoning.THINKING,
        {"conversations": [said("human", "Hi"), {**said("gpt", "Hello"), "reasoning_content": "They greet me."}]},
        [user("Hi"), THOUGHT],
        ["<think>\nThey greet me.\n</think>\n\nHello<|im_end|>"],
        None,
    ),
    "two turns": (
        reasoning.THINKING,
        {"messages": [user("Hi"), assistant("Hello"), user("And?"), assistant("Fine")]},
        None,
        ["<think>\n\n</think>\n\nFine<|im_end|>"],
        f"1 answer {OF_ANSWERS[REWRITTEN]}",
    ),
    "the assistant begins": (
        reasoning.DEFAULT_SYSTEM,
        {"conversations": [said("gpt", "Welcome!"), said("human", "Hi"), said("gpt", "Hello")]},
        [assistant("Welcome!"), user("Hi"), assistant("Hello")],
        ["Hello<|im_end|>"],
        f"1 answer {OF_ANSWERS[UNPROMPTED]}",
    ),
    "arguments as text": (
        reasoning.JOINS_TEXT,
        {"messages": [user("?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, assistant("Rain.")]},
        None,
        ['[weather {"city": "Bern"}]<|im_end|>', "Rain.<|im_end|>"],
        None,
    ),
    "think tokens": (
        reasoning.THINKING,
        {"messages": [user("Hi"), assistant("<think>\nhm\n</think>\n\nHello")]},
        None,
        ["<think>\nhm\n</think>\n\nHello<|im_end|>"],
        None,
    ),
    "a call that the template leaves out": (
        reasoning.DEFAULT_SYSTEM,
        {"messages": [user("?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, assistant("Rain.")]},
        None,
        ["Rain.<|im_end|>"],
        f"1 answer {OF_ANSWERS[EMPTY]}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_a_row_is_what_transformers_renders(case: Any, here: Path, llmctl: Program) -> None:
    template, record, messages, answers, note = case
    tokenizer = model(here, template)
    write(here, record)
    found = inspected(llmctl)
    (row,) = found["rows"]
    wanted = tokenizer.apply_chat_template(messages or record["messages"], return_dict=False)
    assert (row["ids"], row["text"]) == (wanted, tokenizer.decode(wanted))
    assert answers_of(row, tokenizer) == answers
    notes = found["account"]["notes"]
    assert note in notes if note else not notes


def test_answers_that_are_rewritten_may_have_rows_of_their_own(here: Path, llmctl: Program) -> None:
    """Each as inference renders it: the record up to it."""
    tokenizer = model(here, reasoning.THINKING)
    talk = [
        user("a"),
        assistant("b"),
        user("c"),
        {**assistant("d"), "reasoning_content": "e"},
        user("f"),
        assistant("g"),
    ]
    write(here, {"messages": talk}, {"messages": talk[:2]})
    found = inspected(llmctl, "data.rewritten=split", "--rows", "9")
    rows = found["rows"]
    lengths = (2, 4, 6, 2)
    assert [row["ids"] for row in rows] == [
        tokenizer.apply_chat_template(talk[:length], return_dict=False) for length in lengths
    ]
    thoughts = ("", "e", "", "")
    assert [answers_of(row, tokenizer) for row in rows] == [
        [f"<think>\n{thought}\n</think>\n\n{talk[length - 1]['content']}<|im_end|>"]
        for length, thought in zip(lengths, thoughts, strict=True)
    ]
    assert [row["place"].rpartition(":")[2] for row in rows] == ["1", "1", "1", "2"]
    assert (found["account"]["read"], found["account"]["kept"], found["formats"]) == (2, 2, {"messages": 2})
    assert found["account"]["notes"] == [f"2 answers {OF_ANSWERS['split']}"]


def test_rows_of_a_record_are_trained_or_held_out_together(here: Path) -> None:
    """Each row of a record holds what those before it hold."""
    tokenizer = reasoning.thinking(reasoning.THINKING)
    talk = [user("a"), assistant("b"), user("c"), assistant("d")]
    path = write(here, *[{"messages": [user(f"{n}"), *talk[1:]]} for n in range(30)])
    data = SftData(train=[str(path)], rewritten="split", eval_fraction=0.2)
    made, held = talk_rows(data, tokenizer, 512, 0, SILENT)
    assert held is not None and len(held.laid.pieces) == 12
    kept = {made.places[doc] for doc in made.laid.pieces.doc}
    assert len(kept) == 24 and not kept & {held.places[doc] for doc in held.laid.pieces.doc}


def test_a_record_without_an_answer_that_can_be_trained_is_dropped(here: Path, llmctl: Program) -> None:
    model(here, reasoning.DEFAULT_SYSTEM)
    write(here, {"messages": [user("a"), assistant("b")]}, {"messages": [assistant("Welcome"), user("Hi")]})
    found = inspected(llmctl)
    assert found["of"] == 1
    assert found["account"]["counts"] == {UNTRAINABLE[UNPROMPTED]: 1}
    assert (found["account"]["read"], found["account"]["kept"]) == (2, 1)


def test_keys_that_the_template_does_not_read_are_said(here: Path, llmctl: Program) -> None:
    model(here, reasoning.DEFAULT_SYSTEM)
    turn = {**assistant("b"), "mood": "glad", "weight": 1}
    tools = [{"name": "look", "parameters": {}}]
    write(here, *[{"messages": [{**user("a"), "name": "Ann"}, turn], "tools": tools}] * 2)
    notes = inspected(llmctl)["account"]["notes"]
    assert notes == [
        "2 records: `mood` left out, which the chat template does not write",
        "2 records: tools left out, which the chat template does not write",
    ]
    ended = llmctl("data", "stats", "data.jsonl", "--model", "model")
    assert ended.code == 0 and notes[0] in ended.err


def test_what_a_preference_loses_is_counted_once(here: Path, llmctl: Program) -> None:
    model(here, reasoning.DEFAULT_SYSTEM)
    sides = {"chosen": [{**assistant("b"), "mood": "glad"}], "rejected": [{**assistant("c"), "mood": "sad"}]}
    write(here, {"prompt": [user("a")], **sides}, {"prompt": [user("d")], **sides})
    notes = inspected(llmctl)["account"]["notes"]
    assert notes == ["2 records: `mood` left out, which the chat template does not write"]


def test_preferences_follow_the_prompt_of_inference(here: Path, llmctl: Program) -> None:
    tokenizer = model(here, reasoning.THINKING)
    prompt = [user("a"), assistant("b"), user("c")]
    write(here, {"prompt": prompt, "chosen": [assistant("d")], "rejected": [THOUGHT]})
    (row,) = inspected(llmctl)["rows"]
    assert row["prompt_ids"] == tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=False
    )
    for side, answer in (("chosen_ids", assistant("d")), ("rejected_ids", THOUGHT)):
        whole = tokenizer.apply_chat_template([*prompt, answer], return_dict=False)
        assert [*row["prompt_ids"], *row[side]] == whole[:-1]  # a line break follows the end


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (
            reasoning.DEFAULT_SYSTEM,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            "data.jsonl:1: no trained token in the row",
        ),
        (
            "{% if messages[-1].role == 'assistant' %}!{% endif %}" + reasoning.DEFAULT_SYSTEM,
            assistant("d"),
            "data.jsonl:1: the prompt is rendered in another way for training than for inference: ",
        ),
    ],
)
def test_preferences_of_which_nothing_can_be_trained(
    template: str, answer: dict[str, Any], message: str, here: Path, llmctl: Program
) -> None:
    """Though an earlier answer, of the prompt, could be."""
    model(here, template)
    write(here, {"prompt": [user("a"), assistant("b"), user("c")], "chosen": [answer], "rejected": [THOUGHT]})
    ended = llmctl("data", "inspect", "data.jsonl", "--model", "model")
    assert ended.code == 1 and message in ended.err


# --- the templates that TRL ships ------------------------------------------------------------------------


def written() -> dict[str, str]:
    """Template -> its line of the table in docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    found = SCRIPT.TABLE.search(page)
    assert found is not None
    lines = [line for line in found[0].splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def test_some_templates_of_the_table() -> None:
    known = written()
    assert list(SCRIPT.table(QUICK))[2:] == [known[name] for name in QUICK]


@pytest.mark.slow
def test_all_templates_of_the_table() -> None:
    known = written()
    assert known.keys() == (shipped() or {}).keys()
    assert list(SCRIPT.table(known))[2:] == list(known.values())


def test_a_wrong_cell_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is worth what its comparison is worth."""
    theirs = SCRIPT.theirs
    monkeypatch.setattr(
        SCRIPT, "theirs", lambda *given: ((form, ids and ids[:-1]) for form, ids in theirs(*given))
    )
    with pytest.raises(AssertionError, match="qwen3, one turn: other ids than those of transformers"):
        list(SCRIPT.table(["qwen3"]))
    monkeypatch.setattr(SCRIPT, "RECORDS", {"tools": SCRIPT.RECORDS["tools"]})
    monkeypatch.setattr(SCRIPT, "theirs", lambda *given: [("", [1])])
    with pytest.raises(AssertionError, match=r"cohere, tools: .*the chat template refuses it"):
        list(SCRIPT.table(["cohere"]))
