"""A tiny corpus, tokenizer and model made once."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmctl.data import tinyworld
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import PretrainRecipe, SftRecipe, TokenizerRecipe
from llmctl.stages import pretrain, sft, tokenizer
from llmctl.talk import SILENT

DOCUMENTS = 120
VOCABULARY = 300
SMALL = [
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=32",
    "model.max_position_embeddings=64",
]
SHORT = [
    "train.max_steps=12",
    "train.per_device_train_batch_size=4",
    "train.learning_rate=1e-2",
    "train.logging_steps=1",
    "train.threads=1",
]
RECORDS = 40
LONGEST = 44  # characters of a record; under the chat template fewer tokens than the context holds
# a command line that trains, in a folder that has `data.jsonl` and `tok`
TRAIN = ["pretrain", "--tokenizer", "tok", "--data", "data.jsonl", *SMALL, *SHORT]
FEW = [
    "lora.r=4",
    "train.max_steps=6",
    "train.per_device_train_batch_size=4",
    "train.learning_rate=1e-2",
    "train.logging_steps=1",
    "train.save_steps=3",
    "train.sample_steps=6",
    "train.sample_tokens=8",
    "train.threads=1",
    "train.dtype=float32",
]
# the same in a folder that has `talks.jsonl` and `base`
TUNE = ["sft", "base", "--data", "talks.jsonl", *FEW]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of short texts."""
    file = tmp_path_factory.mktemp("corpus") / "data.jsonl"
    texts = tinyworld.statements(documents=DOCUMENTS)
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return file


@pytest.fixture(scope="session")
def tok(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `tokenizer train` run: byte-bpe of 300 entries."""
    out = tmp_path_factory.mktemp("tokenizer") / "tok"
    flags = {"data.train": [str(corpus)], "vocab_size": VOCABULARY, "out": str(out)}
    tokenizer.run(load_recipe(TokenizerRecipe, None, flags, []), SILENT)
    return out


@pytest.fixture(scope="session")
def base(corpus: Path, tok: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `pretrain` run of 12 steps."""
    folder = tmp_path_factory.mktemp("pretrain")
    flags = {
        "data.train": [str(corpus)],
        "data.cache_dir": str(folder / "cache"),
        "tokenizer": str(tok),
        "out": str(folder / "base"),
    }
    pretrain.run(load_recipe(PretrainRecipe, None, flags, SMALL + SHORT), SILENT)
    return folder / "base"


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of short Alpaca records."""
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    records = [one for one in tinyworld.instructions("heldout") if len("".join(one.values())) <= LONGEST]
    file.write_text("".join(json.dumps(one) + "\n" for one in records[:RECORDS]))
    return file


@pytest.fixture(scope="session")
def adapter(talks: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `sft` run of 6 steps on `base`."""
    out = tmp_path_factory.mktemp("sft") / "adapter"
    flags = {"data.train": [str(talks)], "base": str(base), "out": str(out)}
    sft.run(load_recipe(SftRecipe, None, flags, FEW), SILENT)
    return out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of this test alone: the default cache lies in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def here(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the program is run in, empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stocked(here: Path, corpus: Path, tok: Path, base: Path) -> Path:
    """`here` with copies of the corpus, the tokenizer and the model: `data.jsonl`, `tok`, `base`."""
    shutil.copy(corpus, here / "data.jsonl")
    shutil.copytree(tok, here / "tok")
    shutil.copytree(base, here / "base")
    return here


@pytest.fixture
def talking(stocked: Path, talks: Path, adapter: Path) -> Path:
    """`stocked` with copies of the talks and of an adapter: `talks.jsonl` and `adapter`."""
    shutil.copy(talks, stocked / "talks.jsonl")
    shutil.copytree(adapter, stocked / "adapter")
    return stocked


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models this small are slower on two threads than on one, and `auto` should not look at this machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mounted(folder: Path, megabytes: int) -> Path:
    """A file system of its own in memory, so that it can be filled; skips the test where that is not allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` program to make a small disk with")
    if done.returncode:
        pytest.skip(f"a small disk cannot be made: {done.stderr.strip()}")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 1 MB, unmounted afterwards."""
    folder = mounted(tmp_path / "disk", 1)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 64 MB, unmounted afterwards."""
    folder = mounted(tmp_path / "disk", 64)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def sharp(talking: Path) -> Path:
    """The folder the program runs in, with `sharp`: a model with opinions, wide enough for groups."""
    folder = talking / "sharp"
    shutil.copytree(
        talking / "base", folder, ignore=shutil.ignore_patterns("run.json", "recipe.yaml", "checkpoints")
    )
    sizes = {"hidden_size": 64, "intermediate_size": 112, "head_dim": 32, "initializer_range": 0.15}
    spec = load_model(folder).config.spec.model_copy(update=sizes)
    save_model(new_model(spec, 3, bos_token_id=1, eos_token_id=[2, 4]), folder)
    return talking
