"""Models, tokenizers and prompts that cannot be used, through the real command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.errors import one_of
from llmctl.model.families import FAMILIES
from tests.program import Program
from tests.stages.bad_input import (
    NEW,
    WEIGHTS,
    Bad,
    Make,
    cases,
    check,
    file,
    folder,
)
from tests.stages.conftest import VOCABULARY

SUPPORTED = f"supported: {one_of([*FAMILIES, 'llmctl'])}"


def one_longer(name: str, content: str) -> Make:
    """A maker that gives the tokenizer in the folder `name` one more special token."""

    def make(here: Path) -> None:
        path = here / name / "tokenizer.json"
        value = json.loads(path.read_text())
        last = value["added_tokens"][-1]
        value["added_tokens"].append({**last, "id": VOCABULARY, "content": content})
        path.write_text(json.dumps(value))

    return make


def another_tokenizer(here: Path) -> None:
    """`other`: of the same size as `tok`, with two entries changed for one another."""
    shutil.copytree(here / "tok", here / "other")
    path = here / "other" / "tokenizer.json"
    value = json.loads(path.read_text())
    entries = value["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    path.write_text(json.dumps(value))


TRAINED_WITH = "use the tokenizer the model was trained with"
TOO_MANY = "base: the tokenizer needs 301 rows, but the model has vocab_size 300"

TOKENIZERS = {
    "none": Bad(
        "pretrain --data data.jsonl --out out",
        "no tokenizer",
        "name one with --tokenizer; `llmctl tokenizer train` makes it",
    ),
    "missing": Bad(
        "pretrain --tokenizer no/such/folder --data data.jsonl --out out",
        "no/such/folder: no such folder",
        "name a folder with a tokenizer, or a hub id",
    ),
    "a file where a folder belongs": Bad(
        "pretrain --tokenizer tok/tokenizer.json --data data.jsonl --out out",
        "tok/tokenizer.json: is a file, but a tokenizer is a folder",
        "name the folder it lies in",
    ),
    "not there": Bad(
        "pretrain --tokenizer empty --data data.jsonl --out out",
        "empty: no tokenizer there (no tokenizer.json)",
        "make one with `llmctl tokenizer train DATA --out DIR`",
        folder("empty"),
    ),
    "damaged": Bad(
        NEW,
        "tok/tokenizer.json: line 2: not valid JSON",
        "the file is damaged; copy or train the tokenizer again",
        file("tok/tokenizer.json", '{"version":\n'),
    ),
    "larger than the new model": Bad(
        f"{NEW} model.vocab_size=100",
        "tok: the tokenizer needs 300 rows, but the model has vocab_size 100",
        TRAINED_WITH,
    ),
    "larger than its model, pretrain": Bad(
        "pretrain base --data data.jsonl --out out", TOO_MANY, TRAINED_WITH, one_longer("base", "<|more|>")
    ),
    "larger than its model, eval": Bad(
        "eval base --data data.jsonl", TOO_MANY, TRAINED_WITH, one_longer("base", "<|more|>")
    ),
    "larger than its model, generate": Bad(
        "generate base Anna", TOO_MANY, TRAINED_WITH, one_longer("base", "<|more|>")
    ),
    "another one with a model": Bad(
        "pretrain base --tokenizer other --data data.jsonl --out out",
        "other: not the tokenizer that base was trained with",
        "leave out --tokenizer to use the model's own",
        another_tokenizer,
    ),
    "too small to be made": Bad(
        "tokenizer train data.jsonl --vocab-size 260 --out out",
        "vocab_size: 260 is too small for `byte-bpe`, which needs at least 261",
        "5 special tokens and 256 bytes take the first 261 entries",
    ),
    "unknown kind": Bad(
        "tokenizer train data.jsonl --kind byte-bp --out out",
        "command line: kind: `byte-bp` is not one of `byte-bpe`, `bpe`, `wordpiece`, `unigram`, "
        "`sentencepiece`, `word`, `char`",
        "did you mean `byte-bpe`?",
    ),
}


@cases(TOKENIZERS)
def test_tokenizer(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


AGAIN = "copy or download it again"
COPY = "copy or download the model again"
OTHER_CONFIG = "the weights do not belong to this config.json"


def damage(change: Callable[[Path], object]) -> Make:
    """A maker of `m`, a copy of `base` that something was done to; checkpoints are left behind."""

    def make(here: Path) -> None:
        shutil.copytree(here / "base", here / "m", ignore=shutil.ignore_patterns("checkpoints"))
        change(here / "m")

    return make


def config(**values: object) -> Make:
    """A maker of `m` with other entries in config.json."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage(change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    """A maker of `m` with other tensors."""

    def rewrite(model: Path) -> None:
        found = load_file(model / WEIGHTS)
        change(found)
        save_file(found, model / WEIGHTS, metadata={"format": "pt"})

    return damage(rewrite)


def renamed(name: str) -> Make:
    """A maker of `m` whose weights lie under another name."""
    return damage(lambda model: (model / WEIGHTS).rename(model / name))


def unfinished(model: Path) -> None:
    """A run that stopped before its end: checkpoints, and no weights beside them."""
    (model / WEIGHTS).unlink()
    (model / "checkpoints" / "step-000006").mkdir(parents=True)


def in_pieces(index: str) -> Make:
    """A maker of `m` with an index of several files instead of one."""

    def change(model: Path) -> None:
        (model / WEIGHTS).unlink()
        (model / f"{WEIGHTS}.index.json").write_text(index)

    return damage(change)


def a_folder(name: str) -> Make:
    """A maker of `m` in which a folder lies where a file belongs."""

    def change(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage(change)


def cut_short(size: int) -> Make:
    """A maker of `m` with only the first bytes of its weights."""
    return damage(lambda model: os.truncate(model / WEIGHTS, size))


DESERIALIZING = f"m/{WEIGHTS}: damaged or cut short (Error while deserializing header:"
FROM_CHECKPOINT = f"{AGAIN}, or use a checkpoint of the run"
UP = "model.layers.1.mlp.up_proj.weight"

# error and hint of a model that is wrong in one place, whatever is done with it
MODELS: dict[str, tuple[Make, str, str]] = {
    "no weights": (damage(lambda m: (m / WEIGHTS).unlink()), f"m: no {WEIGHTS}", COPY),
    "unfinished run": (
        damage(unfinished),
        f"m: no {WEIGHTS}",
        "the run was not finished; go on with --resume, or name a folder under checkpoints/",
    ),
    "weights are a folder": (a_folder(WEIGHTS), f"m: no {WEIGHTS}", COPY),
    "pickled weights": (
        renamed("pytorch_model.bin"),
        f"m: no {WEIGHTS}",
        "pytorch_model.bin is a pickle, which can run code; if you trust it: llmctl convert MODEL --allow-pickle",
    ),
    "only an adapter": (
        damage(lambda m: ((m / WEIGHTS).unlink(), (m / "adapter_config.json").write_text("{}"))),
        "m: the adapter does not say which model it belongs to",
        "set base_model_name_or_path in its adapter_config.json",
    ),
    "truncated": (
        cut_short(20000),
        f"{DESERIALIZING} incomplete metadata, file not fully covered)",
        FROM_CHECKPOINT,
    ),
    "truncated in the header": (cut_short(4), f"{DESERIALIZING} header too small)", FROM_CHECKPOINT),
    "empty": (cut_short(0), f"{DESERIALIZING} header too small)", FROM_CHECKPOINT),
    "corrupt": (
        damage(lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 5000)),
        f"{DESERIALIZING} header too large)",
        FROM_CHECKPOINT,
    ),
    "a file of several missing": (
        in_pieces('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        f"m/model-00001-of-00002.safetensors: missing, though {WEIGHTS}.index.json lists it",
        AGAIN,
    ),
    "an index of nothing": (
        in_pieces('{"weight_map": []}'),
        f"m/{WEIGHTS}.index.json: lists no weights",
        COPY,
    ),
    "no config": (
        damage(lambda m: (m / "config.json").unlink()),
        "m: not a model folder (no config.json)",
        "see `llmctl runs list`",
    ),
    "config is a folder": (a_folder("config.json"), "m/config.json: is a folder, not a file", COPY),
    "config is not JSON": (
        file("m/config.json", '{"model_type": llama}'),
        "m/config.json: not valid JSON (Expecting value: line 1 column 16 (char 15))",
        COPY,
    ),
    "config is a list": (file("m/config.json", "[]"), "m/config.json: not a JSON object", COPY),
    "unsupported architecture": (
        config(model_type="gpt_neox"),
        "m/config.json: unsupported architecture `gpt_neox`",
        SUPPORTED,
    ),
    "no architecture": (
        file("m/config.json", "{}"),
        "m/config.json: no model_type",
        SUPPORTED,
    ),
    "another activation": (
        config(hidden_act="gelu"),
        "m/config.json: llama config is not supported: hidden_act: gelu",
        "see docs/model.md",
    ),
    "another kind of rope": (
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
        "m/config.json: llama config is not supported: rope_type: dynamic (supported: default, linear, ntk, yarn, llama3)",
        "see docs/model.md",
    ),
    "config of the wrong type": (
        config(hidden_size="wide"),
        "m/config.json: field 'hidden_size' expected int, got str (value: 'wide')",
        COPY,
    ),
    "config of the wrong size": (
        config(num_hidden_layers=0),
        "m/config.json: num_hidden_layers: should be greater than 0",
        COPY,
    ),
    "config that contradicts itself": (
        config(num_attention_heads=3),
        "m/config.json: the hidden size (16) is not a multiple of the number of attention heads (3)",
        COPY,
    ),
    "missing tensors": (
        tensors(lambda found: [found.pop(UP), found.pop("model.norm.weight")]),
        f"m: missing tensors: {UP}, model.norm.weight",
        OTHER_CONFIG,
    ),
    "unexpected tensor": (
        tensors(lambda found: found.update({"model.layers.1.extra": torch.zeros(3)})),
        "m: unexpected tensors: model.layers.1.extra",
        OTHER_CONFIG,
    ),
    "many unexpected tensors": (
        config(num_hidden_layers=1),
        "m: unexpected tensors: model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight, "
        "model.layers.1.post_attention_layernorm.weight and 4 more",
        OTHER_CONFIG,
    ),
    "wrong shape": (
        tensors(lambda found: found.update({UP: torch.zeros(32, 15)})),
        f"m: tensor {UP} has shape [32, 15], but config.json asks for [32, 16]",
        "the weights belong to another config",
    ),
    "whole numbers for weights": (
        tensors(lambda found: found.update({UP: torch.zeros(32, 16, dtype=torch.int32)})),
        f"m: tensor {UP} holds torch.int32, not weights",
        "is it quantized?",
    ),
    "no tokenizer": (
        damage(lambda m: (m / "tokenizer.json").unlink()),
        "m: no tokenizer there (no tokenizer.json)",
        "make one with `llmctl tokenizer train DATA --out DIR`",
    ),
}


@pytest.mark.parametrize(
    "words", ["generate m Anna", "eval m --data data.jsonl", "pretrain m --data data.jsonl --out out"]
)
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, words: str, stocked: Path, llmctl: Program) -> None:
    make, error, hint = MODELS[name]
    check(Bad(words, error, hint, make), stocked, llmctl)


PROMPTS = {
    "no such folder": Bad(
        "generate no/such/folder Anna",
        "no/such/folder: no such folder",
        "name a folder with a model, or a hub id",
    ),
    "a file where a folder belongs": Bad(
        "generate base/model.safetensors Anna",
        "base/model.safetensors: is a file, but a model is a folder",
        "name the folder it lies in",
    ),
    "no model": Bad(
        "eval --data data.jsonl",
        "missing argument MODEL",
        "name a run folder, a Hugging Face folder or a hub id",
        code=2,
    ),
    "no prompt": Bad("generate base", "missing argument PROMPT", "see `llmctl generate --help`", code=2),
    "prompt without quotes": Bad(
        "generate base Anna lives",
        "unexpected argument: lives",
        "put quotes around a PROMPT of several words",
        code=2,
    ),
    "prompt longer than the context": Bad(
        f"generate base {'!?' * 40}",
        "the prompt has 81 tokens, but the model's context is 64",
        "shorten the prompt",
    ),
    "no template": Bad(
        "generate base Anna --chat",
        "base: the tokenizer has no chat template",
        "leave out --chat",
        lambda here: (here / "base" / "chat_template.jinja").unlink(),
    ),
    "float16 on a CPU": Bad(
        "generate base Anna --device cpu generate.dtype=float16",
        "generate.dtype: float16 is far slower than float32 on a CPU",
        "use bfloat16, float32 or auto",
    ),
}


@cases(PROMPTS)
def test_prompt(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)
