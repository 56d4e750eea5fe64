"""Every file that is read back, damaged in ways a crash, an editor or a stranger could."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

from llmctl.data.document import Account, Limit
from llmctl.data.formats import examples
from llmctl.data.readers import documents
from llmctl.data.shards import open_shards
from llmctl.errors import UserError
from llmctl.model.adapter_file import read_settings
from llmctl.model.generation import read_generation_config
from llmctl.model.open import base_of, open_config
from llmctl.recipe.load import check_file
from llmctl.runs import find_runs, finished_metrics, read_manifest, status_of
from llmctl.stages.text import encoder_of
from llmctl.talk import SILENT
from llmctl.tokenizer.load import load_tokenizer
from llmctl.train.checkpoint import checkpoints, load_training_state
from llmctl.train.journal import cut_rows
from tests.fuzz.strategies import changed_json, damaged

transformers_logging.set_verbosity_error()


def either(path: Path) -> st.SearchStrategy[bytes]:
    """A JSON file with other values, or with other bytes."""
    value = json.loads(path.read_text())
    return st.one_of(changed_json(value).map(str.encode), damaged(path.read_bytes()))


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "model")


# file of a model or run folder -> what reads it
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": open_config,
    "tokenizer_config.json": lambda folder: load_tokenizer(str(folder)),
    "generation_config.json": lambda folder: read_generation_config(folder, {}),
    "recipe.yaml": lambda folder: check_file(folder / "recipe.yaml"),
}


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
def test_a_json_file_of_a_model(fuzz, model, name):
    path = model / name
    inputs = either(path)

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        READERS[name](model)

    ended = fuzz(inputs, read, 60)
    assert ended["refused"]


def test_a_tokenizer(fuzz, tok, tmp_path):
    folder = shutil.copytree(tok, tmp_path / "tok")
    inputs = either(folder / "tokenizer.json")

    def read(raw: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(raw)
        load_tokenizer(str(folder))

    fuzz(inputs, read, 40)


def test_the_settings_of_an_adapter(fuzz, tmp_path):
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path="base", target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    inputs = either(tmp_path / "adapter_config.json")

    def read(raw: bytes) -> None:
        (tmp_path / "adapter_config.json").write_bytes(raw)
        read_settings(tmp_path)
        base_of(tmp_path)

    fuzz(inputs, read, 50)


@pytest.mark.xfail(
    strict=True, reason="runs.py: the readers of run.json are mended on the branch of the run folder"
)
def test_a_manifest(fuzz, model, tmp_path):
    inputs = either(model / "run.json")
    recipe = (model / "recipe.yaml").read_text()

    def read(raw: bytes) -> None:
        (model / "run.json").write_bytes(raw)
        for run in find_runs(tmp_path):
            status_of(run, read_manifest(run))
            finished_metrics("pretrain", run, recipe)

    fuzz(inputs, read, 60)


def test_the_lines_of_metrics(fuzz, model):
    path = model / "metrics.jsonl"
    inputs = damaged(path.read_bytes())

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        cut_rows(model, 5)

    fuzz(inputs, read, 40)
    lines = path.read_text().splitlines() or ["{}"]
    values = st.lists(changed_json(json.loads('{"step": 1, "loss": 2.5}')), max_size=3)
    assert lines

    def read_lines(found: list[str]) -> None:
        path.write_text("\n".join(found))
        cut_rows(model, 5)

    fuzz(values, read_lines, 40)


@pytest.mark.parametrize("name", ["state.json", "rng.pt", "optimizer.pt"])
def test_a_checkpoint(fuzz, model, name):
    (last,) = checkpoints(model)[-1:]
    path = last / name
    inputs = either(path) if name.endswith(".json") else damaged(path.read_bytes())
    weight = torch.nn.Parameter(torch.zeros(2))
    before = torch.get_rng_state()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        checkpoints(model)
        load_training_state(last, torch.optim.AdamW([weight]))

    fuzz(inputs, read, 40)
    torch.set_rng_state(before)


def test_the_index_of_shards(fuzz, corpus, tok, tmp_path):
    encoder = encoder_of(load_tokenizer(str(tok)))
    made = open_shards([corpus], "text", encoder, tmp_path / "cache", SILENT)
    whole = shutil.copytree(made.path, tmp_path / "whole")
    inputs = either(whole / "meta.json")
    tokens = made.ids.size

    def read(raw: bytes) -> None:
        (made.path / "meta.json").write_bytes(raw)
        found = open_shards([corpus], "text", encoder, tmp_path / "cache", SILENT)
        assert found.ids.size == tokens
        assert found.doc_start[-1] == tokens

    fuzz(inputs, read, 25)


TEXTS = [{"text": f"Some words, {n}."} for n in range(4)]
TALKS = [{"instruction": f"What is {n}?", "output": "A number.", "history": [["a", "b"]]} for n in range(3)]
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}]
CALLS = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
            },
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    }
]


def jsonl(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def parquet(values: list[Any]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), sink)
    return sink.getvalue()


FILES: dict[str, bytes] = {
    "a.jsonl": jsonl(TEXTS),
    "a.json": json.dumps(TEXTS, indent=1).encode(),
    "a.csv": b'text,other\n"Some, words",1\n"more\nof them",2\n',
    "a.txt": "Some words. Größe 三条\r\n".encode() * 3,
    "a.parquet": parquet(TEXTS),
    "a.jsonl.gz": gzip.compress(jsonl(TEXTS), mtime=0),
    "b.jsonl": jsonl(TALKS),
    "c.json": json.dumps(PAIRS).encode(),
    "d.jsonl": jsonl(CALLS),
    "d.parquet": parquet(CALLS),
}


def read_data(path: Path) -> None:
    """As records and as documents: either may refuse the file."""
    refused = []
    for read in (documents, examples):
        try:
            for _ in read([path], "text", Account(), Limit(0.5)):
                pass
        except UserError as error:
            refused.append(error)
    if refused:
        raise refused[0]


@pytest.mark.parametrize("name", FILES)
def test_data(fuzz, tmp_path, name):
    path = tmp_path / name

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        read_data(path)

    fuzz(damaged(FILES[name]), read, 40)


@pytest.mark.parametrize(
    ("name", "values"), {"talks": TALKS, "pairs": PAIRS, "calls": CALLS, "texts": TEXTS}.items()
)
def test_records(fuzz, tmp_path, name, values):
    path = tmp_path / f"{name}.jsonl"

    def read(found: list[str]) -> None:
        path.write_text("\n".join(found))
        read_data(path)

    fuzz(st.lists(changed_json(values[0]), min_size=1, max_size=2), read, 60)
