"""`llmctl data stats`: figures and tables, with and without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llmctl.tokenizer.load import load_tokenizer
from tests.program import Program
from tests.turns import assistant, system, user, write


def conversations(folder: Path) -> Path:
    return write(
        folder,
        {"messages": [system("Be"), user("A"), assistant("B")]},
        {"messages": [user("Ö"), assistant("中文"), user("A"), assistant("word " * 40)]},
        {"messages": [user("A"), assistant("")]},
        {"messages": [system("Be "), user(" A"), assistant("B")]},
        name="talks.jsonl",
    )


def test_tables(here: Path, llmctl: Program) -> None:
    ended = llmctl("data", "stats", str(conversations(here)))
    assert ended.code == 0
    said = ended.err.splitlines()
    assert "read 4 records, kept 3" in said
    assert any(line.startswith("dropped 1: the answer is empty (") for line in said)
    rows = [line.split() for line in ended.out.splitlines() if line]
    for row in (
        ["records", "3", "(3", "messages)"],
        ["turns", "min", "2,", "median", "2,", "p95", "4,", "max", "4"],
        ["system", "prompts", "2", "of", "3", "(66.7%),", "2", "distinct"],
        ["repeats", "1", "of", "3", "(33.3%)"],
        [f"{here}/talks.jsonl:4", "repeats", "the", "one", "at", "1"],
        ["characters", "of", "messages", "min", "median", "p95", "max", "total"],
        ["assistant", "4", "1", "1", "200", "200", "204"],
        ["assistant", "4", "1", "1", "200", "200", "208"],
        ["Latin", "98.8%", "3"],
        ["Han", "1.2%", "0"],
    ):
        assert row in rows, f"{row}\n{ended.out}"
    assert "tokens" not in ended.out


def test_figures_without_a_model_need_no_torch(here: Path) -> None:
    path = conversations(here)
    code = (
        "import sys; from llmctl.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([n for n in ('torch', 'transformers') if n in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "data", "stats", str(path), "--json"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1] == "[]"
    found = json.loads(ended.stdout)
    assert found["records"] == 3
    assert found["tokens"] is None
    assert found["account"]["read"] == found["account"]["kept"] + sum(found["account"]["counts"].values())


def test_tokens_of_conversations(stocked: Path, llmctl: Program) -> None:
    path = conversations(stocked)
    ended = llmctl("data", "stats", str(path), "--model", "base", "--template", "chatml", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["tokens"]
    tokenizer = load_tokenizer("base")
    theirs = [
        tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for record in map(json.loads, path.read_text().splitlines())
        if record["messages"][-1]["content"]
    ]
    lengths = [len(row["input_ids"]) for row in theirs]
    trained = [sum(row["assistant_masks"]) for row in theirs]
    assert found["lengths"]["row"]["total"] == sum(lengths)
    assert found["lengths"]["row"]["max"] == max(lengths)
    assert found["lengths"]["answer"]["total"] == found["trained"] == sum(trained)
    assert found["lengths"]["prompt"]["total"] == sum(lengths) - sum(trained)
    assert (found["context"], found["longer_than_context"]) == (64, sum(n > 64 for n in lengths)) == (64, 1)
    size = sum(
        len(message["content"].encode())
        for record in map(json.loads, path.read_text().splitlines())
        if record["messages"][-1]["content"]
        for message in record["messages"]
    )
    assert found["tokens_per_byte"] == sum(lengths) / size


def test_tokens_of_preferences_and_labels(stocked: Path, llmctl: Program) -> None:
    pairs = write(
        stocked,
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": "B", "rejected": "a " * 70},
        name="pairs.jsonl",
    )
    labelled = write(stocked, {"prompt": "Hi", "completion": "Yes", "label": False}, name="kto.jsonl")
    words = ("data", "stats", str(pairs), str(labelled), "--model", "base", "--template", "chatml")
    found = json.loads(llmctl(*words, "--json").out)["tokens"]
    tokenizer = load_tokenizer("base")
    asked = len(tokenizer.apply_chat_template([user("Hi")], add_generation_prompt=True)["input_ids"])

    def answer(text: str) -> int:
        return len(tokenizer(text.strip() + "<|im_end|>", add_special_tokens=False)["input_ids"])

    chosen, rejected = [answer("Yes"), answer("B")], [answer("No"), answer("a " * 70)]
    lengths = found["lengths"]
    assert (lengths["prompt"]["count"], lengths["prompt"]["total"]) == (3, 3 * asked)
    assert (lengths["chosen"]["total"], lengths["rejected"]["total"]) == (sum(chosen), sum(rejected))
    assert lengths["answer"] == {key: answer("Yes") if key != "count" else 1 for key in lengths["answer"]}
    longest = [asked + max(pair) for pair in zip(chosen, rejected, strict=True)]
    assert lengths["row"]["max"] == max(longest)
    assert found["longer_than_context"] == 1
    assert found["trained"] == sum(chosen) + sum(rejected) + answer("Yes")
    table = llmctl(*words).out
    for said in (
        "the shorter answer is chosen",
        "a rule of length alone",
        "longer than 64 tokens",
        "unwanted",
    ):
        assert said in table


def test_tokens_of_text(stocked: Path, llmctl: Program) -> None:
    path = write(stocked, {"body": "word " * 30}, {"body": "A"}, name="text.jsonl")
    ended = llmctl("data", "stats", str(path), "data.text_field=body", "--model", "base", "--json")
    found = json.loads(ended.out)["tokens"]
    tokenizer = load_tokenizer("base")
    lengths = [
        2 + len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("word " * 30, "A")
    ]
    assert list(found["lengths"]) == ["row"]
    assert found["lengths"]["row"]["total"] == sum(lengths)
    assert found["trained"] == sum(lengths) - 2, "the first token of a row is predicted by nothing"


def test_builtin_data(here: Path, llmctl: Program) -> None:
    found = json.loads(llmctl("data", "stats", "builtin:tinyworld-preferences", "--json").out)
    assert found["preferences"]["pairs"] == found["records"] > 100
    shares = [found["preferences"][name] for name in ("longer_chosen", "shorter_chosen", "same_length")]
    assert abs(sum(shares) - 1) < 1e-9
