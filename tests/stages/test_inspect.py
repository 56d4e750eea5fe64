"""`llmctl data inspect`: what it shows is what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.data.batches import IGNORE, collate
from llmctl.recipe.tune import PairData, SftData
from llmctl.stages.pairs import read_pairs
from llmctl.stages.rows import read_rows
from llmctl.talk import SILENT
from llmctl.tokenizer.load import load_tokenizer
from tests.program import Program
from tests.turns import assistant, system, user, write

FEW = ["--template", "chatml", "--model", "base"]


def inspected(llmctl: Program, *words: str) -> dict[str, Any]:
    """The JSON document of a command that succeeds."""
    ended = llmctl("data", "inspect", *words, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def talks(folder: Path) -> Path:
    """Three records that fit a context of 64 tokens, and one that does not."""
    return write(
        folder,
        {"messages": [user("Hi"), assistant("Yo"), user("Ok"), assistant("So")]},
        {"messages": [system("Be"), user("A"), assistant("B")]},
        {"messages": [user("C"), assistant(" ")]},
        {"messages": [user("A"), assistant("word " * 40)]},
        {"messages": [user("Ö"), assistant("中")]},
        name="talks.jsonl",
    )


def pairs(folder: Path) -> Path:
    return write(
        folder,
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": "a " * 50, "rejected": "b"},
        name="pairs.jsonl",
    )


def test_rows_are_those_of_training(stocked: Path, llmctl: Program) -> None:
    path = talks(stocked)
    found = inspected(llmctl, str(path), *FEW, "--overlong", "drop", "--rows", "9")
    tokenizer = load_tokenizer("base")
    data = SftData(train=[str(path)], template="chatml", overlong="drop")
    made = read_rows(data.train, data, tokenizer, 64, SILENT)
    assert found["of"] == len(found["rows"]) == 3
    assert [row["place"].rpartition(":")[2] for row in found["rows"]] == ["1", "2", "5"]
    # a row of training holds several pieces; together they are the rows that are shown
    batch = collate(made.laid, range(len(made.laid.rows)), pad_id=0)
    trained = sorted(int(label) for row in batch["labels"] for label in row if label != IGNORE)
    shown = [
        token for row in found["rows"] for token, on in zip(row["ids"], row["trained"], strict=True) if on
    ]
    assert sorted(shown) == trained
    assert sum(len(row["ids"]) for row in found["rows"]) == int(made.laid.pieces.length.sum())
    assert found["account"] == made.account.to_json()
    assert found["account"]["counts"] == {"the answer is empty": 1, "longer than 64 tokens": 1}


def test_rows_are_those_of_transformers(stocked: Path, llmctl: Program) -> None:
    """The mask by transformers' own rendering of the same template."""
    path = talks(stocked)
    found = inspected(llmctl, str(path), *FEW, "--overlong", "drop", "--rows", "9")
    tokenizer = load_tokenizer("base")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for row, number in zip(found["rows"], (0, 1, 4), strict=True):
        theirs = tokenizer.apply_chat_template(
            records[number]["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert row["ids"] == theirs["input_ids"]
        assert row["trained"] == theirs["assistant_masks"]
        assert row["text"] == tokenizer.decode(theirs["input_ids"])
        assert row["cut"] is None
        assert row["ids"][len(row["ids"]) - 2] in found["stop_ids"]


def test_the_whole_prompt_may_be_trained(stocked: Path, llmctl: Program) -> None:
    found = inspected(llmctl, str(talks(stocked)), *FEW, "--overlong", "drop", "data.mask_prompt=false")
    first = found["rows"][0]
    # all but the first token, which nothing predicts, and the line break after the last answer
    assert first["trained"] == [0, *[1] * (len(first["ids"]) - 2), 0]


def test_text_shows_what_is_trained(stocked: Path, llmctl: Program) -> None:
    path = talks(stocked)
    ended = llmctl("data", "inspect", str(path), *FEW, "--overlong", "drop", "--rows", "2", "--from", "2")
    assert ended.code == 0
    head, *text = ended.out.splitlines()
    assert head.startswith(f"row 2 of 3  {path}:2  messages  ")
    assert text[:6] == [
        "  <|bos|><|im_start|>system↵",
        "  Be<|im_end|>∎↵",
        "  <|im_start|>user↵",
        "  A<|im_end|>∎↵",
        "  <|im_start|>assistant↵",
        "  ⟦B<|im_end|>∎⟧↵",
    ]
    assert text[6] == "" and text[7].startswith(f"row 3 of 3  {path}:5")
    assert text[-1] == "  ⟦中<|im_end|>∎⟧↵"
    assert "\x1b" not in ended.out + ended.err
    for said in (
        "template: chatml",
        "formats: 4 messages",
        "read 5 records, kept 3",
        f"dropped 1: the answer is empty ({path}:3)",
        f"dropped 1: longer than 64 tokens ({path}:4)",
        "⟦trained⟧; ∎ follows what ends generation",
    ):
        assert said in ended.err.splitlines(), said


def test_a_cut_row_says_what_is_missing(stocked: Path, llmctl: Program) -> None:
    path = talks(stocked)
    words = (str(path), *FEW, "--overlong", "truncate", "--from", "3", "--rows", "1")
    (row,) = inspected(llmctl, *words)["rows"]
    assert len(row["ids"]) == 64
    assert row["place"].endswith(":4")
    whole = load_tokenizer("base").apply_chat_template([user("A"), assistant("word " * 40)])["input_ids"]
    assert row["cut"] == f"tokens 1-64 of {len(whole)}"
    assert row["ids"] == whole[:64]
    assert (
        f"64 tokens, {sum(row['trained'])} trained  cut: {row['cut']}"
        in llmctl("data", "inspect", *words).out
    )


def test_text_is_split_and_all_of_it_trained(stocked: Path, llmctl: Program) -> None:
    path = write(stocked, {"text": "word " * 80}, name="text.jsonl")
    found = inspected(llmctl, str(path), *FEW, "--rows", "9")
    assert found["of"] > 1
    assert found["template"] is None
    assert [row["trained"] for row in found["rows"]] == [
        [0] + [1] * (len(row["ids"]) - 1) for row in found["rows"]
    ]
    total = int(found["rows"][0]["cut"].rpartition(" ")[2])
    assert found["rows"][1]["cut"] == f"tokens 64-{min(127, total)} of {total}"
    ended = llmctl("data", "inspect", str(path), *FEW)
    assert "template" not in ended.err


def test_preferences_are_those_of_training(stocked: Path, llmctl: Program) -> None:
    path = pairs(stocked)
    found = inspected(llmctl, str(path), *FEW, "--overlong", "truncate")
    tokenizer = load_tokenizer("base")
    data = PairData(train=[str(path)], template="chatml", overlong="truncate")
    made = read_pairs(data.train, data, tokenizer, 64, SILENT)
    for row, pair in zip(found["rows"], made.pairs, strict=True):
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (
            pair.prompt_ids,
            pair.chosen_ids,
            pair.rejected_ids,
        )
        assert row["place"] == pair.place
    first, second = found["rows"]
    assert (first["format"], first["chosen"], first["rejected"]) == (
        "preference",
        "Yes<|im_end|>",
        "No<|im_end|>",
    )
    assert first["cut"] is None
    assert second["cut"] == f"{made.pairs[1].cut} tokens at the end"


def test_preferences_as_text(stocked: Path, llmctl: Program) -> None:
    ended = llmctl("data", "inspect", str(pairs(stocked)), *FEW, "--rows", "1", "--overlong", "drop")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[1:] == [
        "prompt",
        "  <|bos|><|im_start|>user↵",
        "  Hi<|im_end|>∎↵",
        "  <|im_start|>assistant↵",
        "chosen",
        "  ⟦Yes<|im_end|>∎⟧",
        "rejected",
        "  ⟦No<|im_end|>∎⟧",
    ]


def test_labelled_answers(stocked: Path, llmctl: Program) -> None:
    path = write(
        stocked,
        {"messages": [user("Hi"), assistant("Yes")], "label": True},
        {"messages": [user("Hi"), assistant("No"), user("?"), assistant("Nay")], "label": False},
        {"messages": [user("Hi"), assistant("a " * 60)], "label": False},
        name="kto.jsonl",
    )
    found = inspected(llmctl, str(path), *FEW, "--overlong", "drop")
    tokenizer = load_tokenizer("base")
    first, second = found["rows"]
    assert (first["label"], second["label"]) == (True, False)
    assert (first["completion"], second["completion"]) == ("Yes<|im_end|>", "Nay<|im_end|>")
    asked = tokenizer.apply_chat_template(
        [user("Hi"), assistant("No"), user("?")], add_generation_prompt=True
    )["input_ids"]
    assert second["prompt_ids"] == asked
    assert found["account"]["counts"] == {"longer than 64 tokens": 1}
    ended = llmctl("data", "inspect", str(path), *FEW, "--overlong", "drop")
    assert "label true" in ended.out and "label false" in ended.out
    (cut,) = inspected(llmctl, str(path), *FEW, "--overlong", "truncate", "--from", "3")["rows"]
    assert len(cut["prompt_ids"]) + len(cut["completion_ids"]) == 64


def test_a_line_for_each_token(stocked: Path, llmctl: Program) -> None:
    path = talks(stocked)
    words = (str(path), *FEW, "--overlong", "drop", "--from", "3", "--rows", "1")
    (row,) = inspected(llmctl, *words)["rows"]
    ended = llmctl("data", "inspect", *words, "--ids")
    _, head, *found = ended.out.splitlines()
    assert head.split() == ["position", "id", "trained", "token", "text"]
    assert [line.split()[:2] for line in found] == [[str(n), str(i)] for n, i in enumerate(row["ids"])]
    assert ["yes" in line.split() for line in found] == list(map(bool, row["trained"]))
    assert [n for n, line in enumerate(found) if line.endswith("ends generation")] == [
        n for n, token in enumerate(row["ids"]) if token in {2, 4}
    ]
    # 中 is three bytes, and its last token completes it
    answer = [line for line, on in zip(found, row["trained"], strict=True) if on]
    assert [line.split('"')[1] if '"' in line else "" for line in answer] == ["", "", "中", "<|im_end|>"]


def test_long_rows_are_cut_on_screen_but_not_in_full(stocked: Path, llmctl: Program) -> None:
    config = json.loads((stocked / "base" / "config.json").read_text())
    (stocked / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    text = "lorem ipsum " * 300
    path = write(stocked, {"messages": [user("A"), assistant(text)]}, name="long.jsonl")
    short = llmctl("data", "inspect", str(path), *FEW)
    full = llmctl("data", "inspect", str(path), *FEW, "--full")
    assert short.code == full.code == 0
    assert text.strip() in full.out and "[…" not in full.out
    (row,) = inspected(llmctl, str(path), *FEW)["rows"]
    assert text.strip() in row["text"], "JSON holds everything"
    left_out = int(short.out.partition("[… ")[2].partition(" tokens")[0].replace(",", ""))
    assert 0 < left_out < len(row["ids"])
    assert len(short.out) < 2500
    assert short.out.endswith("<|im_end|>∎⟧↵\n")
    listed = llmctl("data", "inspect", str(path), *FEW, "--ids").out.splitlines()
    missing = int(next(line for line in listed if "[…" in line).split()[1].replace(",", ""))
    assert len(listed) - 3 + missing == len(row["ids"])
    assert len(llmctl("data", "inspect", str(path), *FEW, "--ids", "--full").out.splitlines()) == 2 + len(
        row["ids"]
    )


def test_data_cannot_write_to_the_terminal(stocked: Path, llmctl: Program) -> None:
    path = write(
        stocked, {"messages": [user("\x1b]0;title\x07"), assistant("\x1b[2J<|im_end|>")]}, name="x.jsonl"
    )
    for words in ((), ("--ids",)):
        ended = llmctl("data", "inspect", str(path), *FEW, *words)
        assert ended.code == 0
        assert "\x1b" not in ended.out and "\x07" not in ended.out
    shown = llmctl("data", "inspect", str(path), *FEW).out
    assert "\\x1b]0;title\\x07" in shown
    # the end token that is spelled out in the data is text; the template's is not
    assert "⟦\\x1b[2J<|im_end|><|im_end|>∎⟧" in shown


def test_files_of_one_kind_are_shown_together(stocked: Path, llmctl: Program) -> None:
    first = talks(stocked)
    second = write(stocked, {"instruction": "A", "output": "B"}, name="alpaca.jsonl")
    third = write(stocked, {"text": "C"}, name="text.jsonl")
    found = inspected(llmctl, str(first), str(second), str(third), *FEW, "--overlong", "drop", "--rows", "9")
    assert [(row["format"], row["place"]) for row in found["rows"]] == [
        ("text", f"{third}:1"),  # texts come first, as in training
        ("messages", f"{first}:1"),
        ("messages", f"{first}:2"),
        ("messages", f"{first}:5"),
        ("alpaca", f"{second}:1"),
    ]


def test_the_template_is_named(stocked: Path, llmctl: Program) -> None:
    path = write(stocked, {"instruction": "A", "output": "B"}, name="alpaca.jsonl")
    ended = llmctl("data", "inspect", str(path), "--model", "base", "--json")
    assert "template: chatml" in ended.err.splitlines()
    assert json.loads(ended.out)["template"] == "chatml"
    own = stocked / "own.jinja"
    own.write_text(
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}Q: {{ message['content'] }}\nA:\n{% endif %}{% endfor %}"
    )
    found = inspected(llmctl, str(path), "--model", "base", "--template", "own.jinja")
    assert found["template"] == "own.jinja"
    assert found["rows"][0]["text"] == "Q: A\nA:\nB<|eos|>"


@pytest.mark.parametrize("name", ["tinyworld-instructions", "tinyworld-preferences"])
def test_builtin_data(name: str, stocked: Path, llmctl: Program) -> None:
    found = inspected(llmctl, f"builtin:{name}", *FEW, "--overlong", "truncate", "--rows", "1")
    assert found["rows"][0]["place"].startswith(f"builtin:{name}:")
    assert found["rows"][0]["format"] in ("alpaca", "messages", "prompt-completion", "preference")
