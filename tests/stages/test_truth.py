"""What is trained is what is shown: ids and labels as the model gets them in a step, as the rows are read, and
as `llmctl data inspect` prints them, compared to the last token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.data.batches import IGNORE, collate
from llmctl.recipe.load import load_recipe
from llmctl.recipe.tune import SftData, SftRecipe
from llmctl.runs import read_manifest
from llmctl.stages import sft
from llmctl.stages.rows import read_rows
from llmctl.talk import SILENT
from llmctl.tokenizer.choose import choose_template
from llmctl.tokenizer.load import load_tokenizer
from llmctl.train.losses import LOSSES, causal_lm
from tests.program import Program
from tests.turns import assistant, call, system, tool, user, write

LENGTH = 64
PAD = 0
Pieces = list[tuple[list[int], list[int]]]  # ids and labels of each document piece, sorted

DATA: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Where?", "input": "", "output": "Here."},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Where?", "input": "", "output": "Where?"},
        {"instruction": "<|im_end|>", "input": "", "output": "a<|eos|>b"},
        {"instruction": "long " * 9, "input": "", "output": "6"},
    ],
    "messages": [
        {"messages": [system("Be."), user("A"), assistant("B")]},
        {"messages": [user("東"), assistant("西 😀")]},
        {"messages": [user(" a\n"), assistant("\n\n b ")]},
    ],
    "turns": [
        {"messages": [user("A"), assistant("B"), user("C"), assistant("D")]},
        {"messages": [user("A"), assistant("A"), user("A"), assistant("A")]},
    ],
    "calls": [{"messages": [user("?"), assistant("", call("f")), tool("x"), assistant("y")]}],
    "completions": [{"prompt": "One two", "completion": " three"}, {"prompt": "A\n", "completion": "B"}],
    "texts": [{"text": "A text. " * 20}, {"text": "<|im_end|> is text here"}, {"text": "x"}],
}
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "alpaca": (["alpaca"], {}),
    "messages": (["messages"], {}),
    "turns": (["turns"], {}),
    "calls": (["calls"], {"overlong": "truncate"}),
    "text": (["texts"], {}),
    "everything": (list(DATA), {}),
    "unpacked": (list(DATA), {"packing": False}),
    "unmasked": (["messages", "turns", "completions"], {"mask_prompt": False}),
    "truncated": (["alpaca", "turns", "texts"], {"overlong": "truncate", "max_length": 28}),
    "split": (["alpaca", "turns", "texts"], {"overlong": "split", "max_length": 20}),
    "alpaca template": (["alpaca", "turns"], {"template": "alpaca"}),
}


def pieces_of(ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> Iterator[tuple]:
    """Documents of a batch as the model takes them apart: a position of 0 begins one. Padding has no label."""
    for row in range(len(ids)):
        starts = [*(position_ids[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        for start, end in pairwise(starts):
            piece = labels[row, start:end].tolist()
            if any(label != IGNORE for label in piece):
                yield ids[row, start:end].tolist(), piece
            else:
                assert ids[row, start:end].eq(PAD).all()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What the model is called with inside the training step, from the moment a run begins."""
    batches: list[dict[str, torch.Tensor]] = []

    def spy(model: torch.nn.Module, batch: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
        def note(module: object, args: tuple, given: dict[str, Any]) -> None:
            batches.append({name: given[name].clone() for name in ("input_ids", "labels", "position_ids")})
            assert given["num_items_in_batch"] == tokens

        inner = model.get_base_model() if model.training and hasattr(model, "peft_config") else model
        hook = inner.register_forward_pre_hook(note, with_kwargs=True)
        loss = causal_lm(model, batch, tokens)
        hook.remove()
        return loss

    monkeypatch.setitem(LOSSES, "causal_lm", spy)
    return batches


def trained(batches: list[dict[str, torch.Tensor]]) -> Pieces:
    return sorted(
        piece for one in batches for piece in pieces_of(one["input_ids"], one["labels"], one["position_ids"])
    )


def read(files: list[str], base: Path, **data: Any) -> Pieces:
    """The rows as they are read, collated one by one."""
    tokenizer = load_tokenizer(str(base))
    section = SftData(train=files, **data)
    choose_template(tokenizer, section.template)
    laid = read_rows(files, section, tokenizer, section.max_length or LENGTH, SILENT).laid
    one_by_one = [collate(laid, [row], pad_id=PAD) for row in range(len(laid.rows))]
    return trained(one_by_one)


def shown(llmctl: Program, files: list[str], base: Path, **data: Any) -> Pieces:
    """What `llmctl data inspect --json` prints."""
    words = [
        f"data.{name}={json.dumps(value).strip(chr(34))}" for name, value in data.items() if name != "packing"
    ]
    outcome = llmctl("data", "inspect", *files, "--model", str(base), "--rows", "99", "--json", *words)
    assert outcome.code == 0, outcome.err
    found = []
    for row in json.loads(outcome.out)["rows"]:
        labels = [token if on else IGNORE for token, on in zip(row["ids"], row["trained"], strict=True)]
        found.append((row["ids"], labels))
    return sorted(found)


@pytest.mark.parametrize(("name", "method"), [*((name, "lora") for name in CASES), ("everything", "full")])
def test_the_trainer_sees_what_is_shown(tmp_path, base, seen, llmctl, name, method):
    names, data = CASES[name][0], {"overlong": "drop", **CASES[name][1]}
    files = [str(write(tmp_path, *DATA[name], name=f"{name}.jsonl")) for name in names]
    out = tmp_path / "out"
    settings = {"train.num_train_epochs": 1.0, "train.per_device_train_batch_size": 3, "train.threads": 1}
    flags = {
        "base": str(base), "out": str(out), "method": method, "data.train": files, "data.eval_fraction": 0.0,
        **{f"data.{name}": value for name, value in data.items()}, **settings,
    }  # fmt: skip
    sft.run(load_recipe(SftRecipe, None, flags, []), SILENT)
    found = trained(seen)
    assert found == read(files, base, **data)
    assert found == shown(llmctl, files, base, **data)
    manifest = read_manifest(out)
    recorded = manifest["data"]["train"]
    labels = sum(label != IGNORE for _, piece in found for label in piece)
    assert recorded["trained_tokens"] == manifest["metrics"]["tokens"] == labels
    assert recorded["tokens"] == sum(len(ids) for ids, _ in found)
    assert recorded["account"]["read"] == sum(len(DATA[name]) for name in names)


def test_every_epoch_is_the_same_rows_in_another_order(tmp_path, base, seen):
    path = str(write(tmp_path, *DATA["alpaca"], *DATA["alpaca"]))
    flags = {
        "base": str(base), "out": str(tmp_path / "out"), "data.train": [path], "data.eval_fraction": 0.0,
        "train.num_train_epochs": 2.0, "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 2, "train.threads": 1, "data.packing": False, "data.overlong": "drop",
    }  # fmt: skip
    sft.run(load_recipe(SftRecipe, None, flags, []), SILENT)
    half = len(seen) // 2
    once = read([path], base, overlong="drop")
    assert trained(seen[:half]) == trained(seen[half:]) == once
    orders = [[one["input_ids"].tolist() for one in part] for part in (seen[:half], seen[half:])]
    assert orders[0] != orders[1]


def test_what_is_held_out_is_never_trained(tmp_path, base, seen):
    path = str(write(tmp_path, *[{"instruction": f"{n}", "input": "", "output": f"{n}"} for n in range(30)]))
    flags = {
        "base": str(base), "out": str(tmp_path / "out"), "data.train": [path], "data.eval_fraction": 0.2,
        "train.num_train_epochs": 1.0, "train.threads": 1,
    }  # fmt: skip
    sft.run(load_recipe(SftRecipe, None, flags, []), SILENT)
    found, whole = trained(seen), read([path], base)
    assert len(found) == 24 and len(whole) == 30
    assert all(piece in whole for piece in found)
    manifest = read_manifest(tmp_path / "out")["data"]
    assert manifest["train"]["trained_tokens"] + manifest["eval"]["trained_tokens"] == sum(
        label != IGNORE for _, labels in whole for label in labels
    )
