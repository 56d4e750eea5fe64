"""Memory while data is read and tokenized: peaks of a process of its own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.data import tinyworld

ALLOWED = 300, 6  # MB, and MB for each MB of the largest document
# rows of conversations hold 8 bytes a token twice, and a token of this vocabulary has 1.5 characters
WITH_ROWS = 300, 8
CHILD = """
import sys
import pyarrow.parquet, transformers, torch
from llmctl.cli.main import main
from llmctl.stages import inspect, pretrain, sft, stats, tokenizer

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))

base = peak()
try:
    main(sys.argv[1:])
finally:
    print("peak", peak() - base, file=sys.stderr)
"""


def text_of(megabytes: int) -> str:
    words = "\n".join(tinyworld.statements(documents=500))
    return (words * (megabytes * 1_000_000 // len(words) + 1))[: megabytes * 1_000_000]


def run(*words: str | Path) -> tuple[float, str]:
    """Peak above the base in MB, and what was said."""
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True)
    *said, peak = done.stderr.splitlines()
    return float(peak.split()[1]), "\n".join(said)


COMMANDS = {
    "pretrain": "pretrain --tokenizer {tok} --out {out} train.max_steps=1 model.hidden_size=16 "
    "model.num_hidden_layers=1 model.num_attention_heads=2 model.intermediate_size=32 "
    "model.max_position_embeddings=64 train.threads=1 --data {text}",
    "tokenizer train": "tokenizer train {text} --vocab-size 300 --out {out}",
    "tokenizer eval": "tokenizer eval {tok} --data {text}",
    "sft": "sft {base} --out {out} train.max_steps=1 data.overlong=truncate train.threads=1 --data {talk}",
    "data inspect": "data inspect {talk} --model {base} --overlong truncate",
    "data stats": "data stats {talk}",
}


def allowed(name: str, megabytes: int, folder: Path, tok: Path, base: Path) -> None:
    text, talk = folder / "text.jsonl", folder / "talk.jsonl"
    long = text_of(megabytes)
    text.write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "short"}) + "\n")
    answers = [{"instruction": "Say it", "output": one} for one in (long, "Hello")]
    talk.write_text("".join(json.dumps(one) + "\n" for one in answers))
    words = COMMANDS[name].format(tok=tok, base=base, out=folder / "out", text=text, talk=talk)
    peak, said = run(*words.split())
    assert "error" not in said, said
    base_mb, each = WITH_ROWS if name in ("sft", "data inspect") else ALLOWED
    assert peak <= base_mb + each * megabytes, said


def test_pretrain_on_a_long_line(tmp_path, home, tok, base):
    # before long texts were cut, 4 MB took 700 MB
    allowed("pretrain", 4, tmp_path, tok, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_of_20_mb(tmp_path, home, tok, base, name):
    allowed(name, 20, tmp_path, tok, base)


def test_a_gzip_bomb_is_not_unpacked_whole(tmp_path, home, tok):
    bomb = tmp_path / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(120):
            file.write(b"a" * 1_000_000)
    words = COMMANDS["pretrain"].format(tok=tok, out=tmp_path / "out", text=bomb)
    peak, said = run(*words.split(), "data.max_document_mb=10")
    assert peak <= ALLOWED[0] + 10 * ALLOWED[1]
    assert said.splitlines()[-2:] == [
        f"error: {bomb}:1: the line is larger than 10 MB",
        "hint: cut it into smaller documents, or raise data.max_document_mb; memory grows by up to 6 times that",
    ]
