"""What can be wrong with `llmctl sft`, through the real command line: what it says, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmctl.runs import read_manifest
from tests.program import Program
from tests.stages.bad_input import Bad, cases, check, file, folder
from tests.stages.conftest import FEW, TUNE

NEW = f"{' '.join(TUNE)} --out out"  # a command line that would work
EXPLAIN = "`llmctl recipe show sft` explains"
LAYERS = "`down_proj`, `gate_proj`, `k_proj`, `o_proj`, `q_proj`, `up_proj`, `v_proj`"


def on(data: str, *words: str) -> str:
    """The command line with other data."""
    return f"{NEW.replace('talks.jsonl', data)} {' '.join(words)}".strip()


def records(name: str, *found: Any) -> Callable[[Path], object]:
    """A maker of a jsonl file."""
    return file(name, "".join(json.dumps(record) + "\n" for record in found))


GOOD = {"instruction": "What?", "input": "", "output": "That."}
LONG = {**GOOD, "output": "word " * 100}

DATA = {
    "none": Bad(
        f"sft base --out out {' '.join(FEW)}",
        "no data to train on",
        "name files with --data; formats: `alpaca`, `messages` …",
    ),
    "misspelt key": Bad(
        on("x.jsonl"),
        "x.jsonl:1: fits no format: keys `instrution`, `output`; nearest is alpaca",
        "did you mean `instruction`?",
        records("x.jsonl", {"instrution": "What?", "output": "That."}),
    ),
    "misspelt key further down": Bad(
        on("x.jsonl"),
        "x.jsonl:3: fits no format: keys `instruction`, `ouput`; nearest is alpaca; line 1 is `alpaca`",
        "did you mean `output`?",
        records("x.jsonl", GOOD, GOOD, {"instruction": "What?", "ouput": "That."}),
    ),
    "all answers empty": Bad(
        on("x.jsonl"),
        "x.jsonl: no usable record (dropped 2: the answer is empty; dropped 1: the answer is null)",
        "mend the file, or leave it out",
        records("x.jsonl", {**GOOD, "output": ""}, {**GOOD, "output": None}, {**GOOD, "output": " \n"}),
    ),
    "arrays for records": Bad(
        on("x.jsonl"),
        "x.jsonl:1: the line holds a list, not an object",
        'a jsonl file holds one object a line, as {"text": "…"}',
        records("x.jsonl", ["What?", "That."]),
    ),
    "trailing comma": Bad(
        on("x.json"),
        "x.json:3: a comma with no record after it",
        "delete the comma",
        file("x.json", f"[{json.dumps(GOOD)},\n{json.dumps(GOOD)},\n]"),
    ),
    "mixed formats": Bad(
        on("x.jsonl"),
        "x.jsonl:2: mixed formats: this record is `prompt-completion`, line 1 is `alpaca`",
        "a file holds one format: put them in files of their own",
        records("x.jsonl", GOOD, {"prompt": "a", "completion": "b"}),
    ),
    "preferences": Bad(
        on("x.jsonl"),
        "x.jsonl:1: a record of preferences (`preference`), not of one answer",
        "use it with `llmctl reward` or `llmctl dpo`",
        records("x.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ),
    "all too long": Bad(
        on("x.jsonl"),
        "3 of 3 records are longer than 64 tokens (x.jsonl:1, x.jsonl:2, x.jsonl:3): too many to drop unasked",
        "raise data.max_length (up to the context of the model), or set data.overlong to drop or truncate",
        records("x.jsonl", LONG, LONG, LONG),
    ),
    "all too long and dropped": Bad(
        on("x.jsonl", "data.overlong=drop"),
        "no record is left to train on (read 2 records, kept 0; "
        "dropped 2: longer than 64 tokens (x.jsonl:1, x.jsonl:2))",
        "raise data.max_length (up to the context of the model), or give other data",
        records("x.jsonl", LONG, LONG),
    ),
    "all cut before the answer": Bad(
        on("x.jsonl", "data.overlong=truncate"),
        "no record is left to train on (read 2 records, kept 0; "
        "dropped 2: nothing of an answer is within 64 tokens (x.jsonl:1, x.jsonl:2))",
        "raise data.max_length (up to the context of the model), or give other data",
        records("x.jsonl", *[{**GOOD, "instruction": "word " * 100}] * 2),
    ),
    "too long is an error": Bad(
        on("x.jsonl", "data.overlong=error"),
        "1 document is longer than max_length=64; the longest, x.jsonl:2, has 324 tokens",
        "set data.overlong to split, truncate or drop, or raise data.max_length (up to the context of the model)",
        records("x.jsonl", GOOD, LONG),
    ),
    "one record": Bad(
        on("x.jsonl"),
        "too little text to hold any out for evaluation: it fits in one row",
        "give more data, name evaluation data in data.eval, or set data.eval_fraction=0",
        records("x.jsonl", GOOD),
    ),
    "missing": Bad(on("talk.jsonl"), "talk.jsonl: no such file or folder", "did you mean `talks.jsonl`?"),
    "missing evaluation data": Bad(
        f"{NEW} --eval-data talk.jsonl", "talk.jsonl: no such file or folder", "did you mean `talks.jsonl`?"
    ),
    "nothing to evaluate on": Bad(
        f"{NEW} train.early_stopping_patience=2 data.eval_fraction=0",
        "train.early_stopping_patience: there is nothing to evaluate on",
        "name files in data.eval, or set data.eval_fraction above 0",
    ),
}

WORDS = {
    "no MODEL": Bad(
        NEW.replace("sft base", "sft"),
        "missing argument MODEL",
        "name a run folder, a Hugging Face folder or a hub id",
        code=2,
    ),
    "MODEL not there": Bad(
        NEW.replace("sft base", "sft no/such/folder"),
        "no/such/folder: no such folder",
        "name a folder with a model, or a hub id",
    ),
    "MODEL is a tokenizer": Bad(
        NEW.replace("sft base", "sft tok"),
        "tok: is a tokenizer, not a model",
        "`llmctl pretrain --tokenizer tok` makes a model for it",
    ),
    "two models": Bad(
        NEW.replace("sft base", "sft base tok"),
        "unexpected argument: tok",
        "one MODEL at most; repeat --data for each file, or quote a pattern: --data '*.txt'",
        code=2,
    ),
    "two methods": Bad(
        f"{NEW} --lora --full", "--lora and --full exclude each other", "give one of them", code=2
    ),
    "two other methods": Bad(
        f"{NEW} --full --qlora", "--qlora and --full exclude each other", "give one of them", code=2
    ),
    "unknown method": Bad(
        f"{NEW} method=lore",
        "command line: method: `lore` is not one of `lora`, `qlora`, `full`",
        "did you mean `lora`?",
    ),
    "targets that match nothing": Bad(
        f"{NEW} lora.target_modules=[q_proj,up_porj]",
        f"lora.target_modules: `up_porj` matches no layer; there is {LAYERS}",
        "did you mean `up_proj`?",
    ),
    "the head as a target": Bad(
        f"{NEW} lora.target_modules=[lm_head]",
        "lora.target_modules: `lm_head` is the output head, which stays as it is",
        f"name layers inside the blocks: {LAYERS}",
    ),
    "targets that are no list": Bad(
        f"{NEW} lora.target_modules=q_proj",
        "command line: lora.target_modules: `q_proj` is neither all-linear nor a list of names; "
        "for one layer write [q_proj]",
        f"{EXPLAIN} lora.target_modules",
    ),
    "no targets": Bad(
        f"{NEW} lora.target_modules=[]",
        "command line: lora.target_modules: `[]` is neither all-linear nor a list of names",
        f"{EXPLAIN} lora.target_modules",
    ),
    "an adapter for a method without one": Bad(
        f"{NEW} --full",
        "command line: `lora` belongs to method lora or qlora; `full` trains the weights themselves",
        f"{EXPLAIN} every field",
    ),
    "no rank": Bad(
        f"{NEW} lora.r=0",
        "command line: lora.r: should be greater than or equal to 1, not 0",
        f"{EXPLAIN} lora.r",
    ),
    "everything dropped": Bad(
        f"{NEW} lora.dropout=1",
        "command line: lora.dropout: should be less than 1, not 1",
        f"{EXPLAIN} lora.dropout",
    ),
    "misspelt field": Bad(
        f"{NEW} lora.alhpa=3", "command line: lora.alhpa: unknown key", "did you mean `alpha`?"
    ),
    "unknown template": Bad(
        f"{NEW} --template chatlm",
        "template: `chatlm` is neither a file nor one of `auto`, `chatml`, `alpaca`",
        "did you mean `chatml`?",
    ),
    "template is a folder": Bad(
        f"{NEW} --template tok", "tok: is a folder, not a template file", "name the file inside it"
    ),
    "template for nothing": Bad(
        f"{NEW} --template t.jinja",
        "t.jinja: the template never reads `messages`",
        "is it a chat template?",
        file("t.jinja", "{{ bos_token }}"),
    ),
    "rows longer than the context": Bad(
        f"{NEW} data.max_length=65",
        "data.max_length is 65, but the model's max_position_embeddings is 64",
        "lower data.max_length, or give the model a longer context",
    ),
    "float16": Bad(
        NEW.replace("train.dtype=float32", "--dtype float16"),
        "train.dtype: float16 needs loss scaling, which this loop does not do",
        "use bfloat16, float32 or auto",
    ),
    "out is occupied": Bad(
        NEW.replace("--out out", "--out base"),
        "base: the folder is not empty",
        "choose another --out, or add --resume to go on with it",
    ),
    "out is a file": Bad(
        NEW.replace("--out out", "--out data.jsonl"),
        "data.jsonl: is a file, but --out names a folder",
        "choose another name",
    ),
    "resume of what": Bad(
        NEW.replace("--out out", "--resume"),
        "--resume does not say which run to go on with",
        "name its folder with --out DIR",
        code=2,
    ),
    "resume of another stage": Bad(
        NEW.replace("--out out", "--out base --resume"),
        "base/recipe.yaml: this recipe is for stage `pretrain`, not `sft`",
        "run `llmctl pretrain`",
    ),
    "resume of a folder that is no run": Bad(
        NEW.replace("--out out", "--out things --resume"),
        "things: not a run, so there is nothing to resume",
        "choose another --out",
        file("things/a.txt", "text"),
    ),
    "an empty folder for a model": Bad(
        NEW.replace("sft base", "sft empty"),
        "empty: the folder is empty",
        "name a run folder, a Hugging Face folder or a hub id",
        folder("empty"),
    ),
}


@cases(DATA)
def test_data(bad: Bad, talking: Path, llmctl: Program) -> None:
    check(bad, talking, llmctl)


@cases(WORDS)
def test_words(bad: Bad, talking: Path, llmctl: Program) -> None:
    check(bad, talking, llmctl)
    if "--resume" not in bad.words and bad.code == 1:
        check(
            Bad(f"{bad.words} --dry-run", bad.error, bad.hint) if "--out out" in bad.words else bad,
            talking,
            llmctl,
        )


# --- what is let through ------------------------------------------------------------------------------


def test_empty_answers_are_dropped_and_counted(talking: Path, llmctl: Program) -> None:
    records("x.jsonl", *[GOOD] * 5, {**GOOD, "output": ""}, {**GOOD, "output": None})(talking)
    outcome = llmctl(*on("x.jsonl").split())
    assert outcome.code == 0, outcome.err
    said = outcome.err.splitlines()
    assert said[2:5] == [
        "read 7 records, kept 5",
        "dropped 1: the answer is empty (x.jsonl:6)",
        "dropped 1: the answer is null (x.jsonl:7)",
    ]
    account = read_manifest(talking / "out")["data"]["train"]["account"]
    assert (account["read"], account["kept"]) == (7, 5)
    assert account["counts"] == {"the answer is empty": 1, "the answer is null": 1}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_byte_order_mark_is_no_text(name: str, talking: Path, llmctl: Program) -> None:
    text = "".join(json.dumps(GOOD) + "\n" for _ in range(3)) if name == "x.jsonl" else json.dumps([GOOD] * 3)
    (talking / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    outcome = llmctl(*on(name).split())
    assert outcome.code == 0 and "read 3 records, kept 3\n" in outcome.err
