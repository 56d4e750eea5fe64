"""Every stage that reads data has a limit for a document, and says which field sets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.program import Program
from tests.stages.conftest import TRAIN

PAIR = {"prompt": "Say hello", "chosen": "Hello", "rejected": "No"}
# command line -> (file that it names, section of the field)
STAGES = {
    " ".join(TRAIN): ("data.jsonl", "data"),
    "tokenizer train data.jsonl --vocab-size 300": ("data.jsonl", "data"),
    "sft base --data talks.jsonl": ("talks.jsonl", "data"),
    "reward base --data pairs.jsonl": ("pairs.jsonl", "data"),
    "dpo base --data pairs.jsonl": ("pairs.jsonl", "data"),
    "data stats talks.jsonl": ("talks.jsonl", "data"),
    "data inspect talks.jsonl --model base": ("talks.jsonl", "data"),
    "eval base --data data.jsonl": ("data.jsonl", "eval"),
    "eval base --answers --data talks.jsonl": ("talks.jsonl", "eval"),
    "compare base base --data talks.jsonl": ("talks.jsonl", "compare"),
    "merge adapter --data talks.jsonl": ("talks.jsonl", "compare"),
    "quantize base --eval-data data.jsonl": ("data.jsonl", "compare"),
}


@pytest.mark.parametrize("words", STAGES)
def test_a_document_beyond_the_limit(words: str, talking: Path, llmctl: Program) -> None:
    (talking / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    file, section = STAGES[words]
    out = [] if words.startswith(("data ", "eval ", "compare ")) else ["--out", "out"]
    outcome = llmctl(*words.split(), *out, f"{section}.max_document_mb=0.00001")
    assert outcome.code == 1, outcome.err
    assert outcome.err.splitlines()[-2:] == [
        f"error: {file}:1: the line is larger than 1e-05 MB",
        f"hint: cut it into smaller documents, or raise {section}.max_document_mb; memory grows by up to 6 times that",
    ]
    assert not (talking / "out").exists()
