"""Every field of the SFT recipe does something: each is changed alone, and what it is for must change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

from llmctl.errors import UserError
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmctl.model.checkpoint import load_model
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import PretrainRecipe
from llmctl.recipe.tune import SftRecipe
from llmctl.runs import read_manifest
from llmctl.stages import pretrain, sft, tune
from llmctl.talk import SILENT
from llmctl.tokenizer.load import load_tokenizer
from tests.program import Program
from tests.stages.conftest import FEW, SMALL

# beside FEW, so that each field has something to act on: a middle of the schedule, momentum, dropped rows
MORE = [
    "base=base",
    "data.train=[talks.jsonl]",
    "data.eval_fraction=0.2",
    "train.warmup_ratio=0.3",
    "train.gradient_accumulation_steps=2",
    "train.weight_decay=0.1",
]


def ran(out: str, *words: str) -> Path:
    """A finished run in `out` with fields as `words` set them."""
    sft.run(load_recipe(SftRecipe, None, {"out": out}, [*FEW, *MORE, *words]), SILENT)
    return Path(out)


@pytest.fixture(scope="module")
def plain(talks: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which no field was changed."""
    folder = tmp_path_factory.mktemp("plain")
    ran(str(folder / "plain"), f"base={base}", f"data.train=[{talks}]")
    return folder / "plain"


def rows(run: Path, kind: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics or samples that say something of `kind`."""
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [row for row in found if kind in row]


# --- what shows in the weights ------------------------------------------------------------------------

WEIGHTS = [
    "lora.alpha=16",
    "lora.dropout=0.5",
    "method=qlora",
    "data.mask_prompt=false",
    "data.packing=false data.max_length=64 train.per_device_train_batch_size=3",
    "data.eval_fraction=0.5",
    "data.template=alpaca data.overlong=truncate",
    "data.max_length=40 data.overlong=truncate",
    "data.train=[data.jsonl] data.eval=[talks.jsonl]",
    "train.max_steps=5",
    "train.learning_rate=2e-2",
    "train.lr_scheduler_type=linear",
    "train.warmup_ratio=0",
    "train.min_lr_ratio=0.5",
    "train.weight_decay=0",
    "train.adam_beta1=0.5",
    "train.adam_beta2=0.5",
    "train.adam_epsilon=1e-2",
    "train.max_grad_norm=1e-3 train.adam_epsilon=1e-2",
    "train.seed=1",
    "train.dtype=bfloat16",
    "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=1",
]


@pytest.mark.parametrize("words", WEIGHTS)
def test_other_weights(words: str, plain: Path, talking: Path) -> None:
    ours, theirs = (load_file(run / ADAPTER_WEIGHTS) for run in (ran("out", *words.split()), plain))
    moved = [not torch.equal(ours[name], weight) for name, weight in theirs.items() if "lora_B" in name]
    assert any(moved) and len(moved) == 14


def test_the_gradient_norm_alone(talking: Path) -> None:
    """AdamW forgives a scale, so its epsilon is made large enough to notice."""
    words = ["train.adam_epsilon=1e-2"]
    one, two = ran("one", *words), ran("two", *words, "train.max_grad_norm=1e-3")
    assert (one / ADAPTER_WEIGHTS).read_bytes() != (two / ADAPTER_WEIGHTS).read_bytes()


# --- what shows elsewhere -----------------------------------------------------------------------------


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def settings(run: Path) -> dict[str, Any]:
    return json.loads((run / ADAPTER_CONFIG).read_text())


def manifest(run: Path) -> dict[str, Any]:
    return read_manifest(run)


def spaced(run: Path, kind: str, name: str = "metrics.jsonl") -> list[int]:
    """The steps at which there are lines of a kind."""
    return sorted({row["step"] for row in rows(run, kind, name)})


def tokens(samples: list[dict[str, Any]], run: Path) -> int:
    """Tokens of the longest answer."""
    tokenizer = load_tokenizer(str(run))
    return max(len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in samples)


# words -> what is looked at, and what it must be
ELSEWHERE: dict[str, tuple[Callable[[Path], object], object]] = {
    "lora.r=3": (lambda run: (settings(run)["r"], min(next(iter(load_file(run / ADAPTER_WEIGHTS).values())).shape)), (3, 2)),
    "lora.target_modules=[q_proj]": (lambda run: settings(run)["target_modules"], ["q_proj"]),
    "method=full lora.r=16": (lambda run: (run / "model.safetensors").is_file(), True),
    "data.eval=[talks.jsonl] data.max_length=60": (
        lambda run: (manifest(run)["data"]["eval"]["account"]["read"], manifest(run)["data"]["train"]["account"]["read"]),
        (40, 40),
    ),
    "data.overlong=drop data.max_length=50": (
        lambda run: list(manifest(run)["data"]["train"]["account"]["counts"]), ["longer than 50 tokens"],
    ),
    "data.text_field=body data.train=[body.jsonl]": (
        lambda run: manifest(run)["data"]["train"]["formats"], {"text": 30},
    ),
    "train.max_steps=null train.num_train_epochs=0.5 data.packing=false": (
        lambda run: manifest(run)["metrics"]["steps"], 2,
    ),
    "train.logging_steps=2": (lambda run: spaced(run, "loss"), [2, 4, 6]),
    "train.eval_steps=3": (lambda run: spaced(run, "eval_loss"), [3, 6]),
    "train.sample_steps=4": (lambda run: spaced(run, "answer", "samples.jsonl"), [0, 4, 6]),
    "train.sample_tokens=3": (lambda run: tokens(rows(run, "answer", "samples.jsonl"), run), 3),
    "train.save_steps=2": (steps, ["step-000004", "step-000006"]),
    "train.save_steps=1 train.save_total_limit=4": (steps, [f"step-00000{n}" for n in (3, 4, 5, 6)]),
    "train.eval_max_rows=1": (
        lambda run: manifest(run)["metrics"]["eval_tokens"] < manifest(run)["data"]["eval"]["trained_tokens"], True,
    ),
    "train.early_stopping_patience=1 train.learning_rate=1 train.eval_steps=1 train.warmup_ratio=0": (
        lambda run: manifest(run)["metrics"]["steps"] < 6 and manifest(run)["metrics"]["best_step"] < manifest(run)["metrics"]["steps"], True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", ELSEWHERE)
def test_other_files(words: str, talking: Path) -> None:
    texts = [json.loads(line)["text"] for line in (talking / "data.jsonl").read_text().splitlines()[:30]]
    (talking / "body.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    look, expected = ELSEWHERE[words]
    assert look(ran("out", *words.split())) == expected


def test_threads(talking: Path) -> None:
    torch.set_num_threads(1)
    ran("out", "train.threads=2", "train.max_steps=1")
    assert torch.get_num_threads() == 2


def test_rows_of_an_evaluation(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, seen = sft.eval_batches, []

    def noted(*args: Any, **words: Any) -> Any:
        for batch in usual(*args, **words):
            seen.append(len(batch["input_ids"]))
            yield batch

    monkeypatch.setattr(sft, "eval_batches", noted)
    ran("out", "train.per_device_eval_batch_size=3", "train.max_steps=1", "data.packing=false")
    assert seen == [3, 3, 2]


def test_recomputed_activations(talking: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, seen = tune.recompute_activations, []

    def noted(model: LlmctlForCausalLM) -> None:
        usual(model)
        seen.append(model.model.gradient_checkpointing)

    monkeypatch.setattr(tune, "recompute_activations", noted)
    assert not seen
    run = ran("out", "train.gradient_checkpointing=true", f"data.train=[{talking / 'talks.jsonl'}]")
    assert seen == [True]
    ours, theirs = (load_file(folder / ADAPTER_WEIGHTS) for folder in (run, plain))
    for name, weight in theirs.items():  # it changes nothing but the memory
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-3)


def test_device(talking: Path) -> None:
    missing = next(name for name in ("cuda", "mps") if not getattr(torch, name).is_available())
    with pytest.raises(UserError, match=f"--device {missing}: not available here"):
        ran("out", f"device={missing}")


def test_base(talking: Path) -> None:
    ran("out", "base=adapter")
    assert read_manifest(Path("out"))["parents"][0]["path"] == "adapter"


# --- and none is forgotten ----------------------------------------------------------------------------

BY_NAME = {
    "data.rewritten",  # which no template of this base has a use for: test_templates.py
    "data.max_document_mb",  # in test_document_limit.py
    "stage", "out", "base", "device", "train.threads", "train.per_device_eval_batch_size", "train.gradient_checkpointing"
}  # fmt: skip


def fields(section: type[BaseModel], above: str = "") -> set[str]:
    """The dotted names of all fields that hold a value."""
    found = set()
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{above}{name}.")
        else:
            found.add(above + name)
    return found


def test_every_field_has_a_test_here() -> None:
    words = [word.partition("=")[0] for line in [*WEIGHTS, *ELSEWHERE] for word in line.split()]
    assert set(words) | BY_NAME == fields(SftRecipe)


# --- the dry run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untied(corpus: Path, tok: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `pretrain` run of one step with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    flags = {"data.train": [str(corpus)], "data.cache_dir": str(folder / "c"), "tokenizer": str(tok)}
    words = [*SMALL, "model.tie_word_embeddings=false", "train.max_steps=1", "train.threads=1"]
    pretrain.run(load_recipe(PretrainRecipe, None, {**flags, "out": str(folder / "m")}, words), SILENT)
    return folder / "m"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "base={untied}",
        "base={untied} method=full lora.r=16",
        "base={untied} data.template=alpaca data.overlong=truncate",
        "method=qlora lora.target_modules=[q_proj,down_proj] lora.r=2",
        "method=full lora.r=16 train.max_steps=null train.num_train_epochs=0.6",
        "base=adapter data.packing=false data.max_length=50 data.overlong=drop",
        "data.eval=[talks.jsonl] train.gradient_accumulation_steps=3 train.max_steps=null train.num_train_epochs=1",
    ],
)
def test_a_dry_run_tells_what_the_run_does(words: str, untied: Path, talking: Path, llmctl: Program) -> None:
    said = [*FEW, *MORE, *words.format(untied=untied).split()]
    before = sorted(talking.rglob("*"))
    planned = llmctl("sft", *(said + ["base=base"] * ("base=" not in words)), "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert sorted(talking.rglob("*")) == before
    plan = json.loads(planned.out)
    out = ran("out", *said)
    found = read_manifest(out)
    data, metrics = found["data"]["train"], found["metrics"]
    assert plan["trained_parameters"] == metrics["trained_parameters"]
    assert (plan["rows"], plan["trained_tokens"]) == (data["rows"], data["trained_tokens"])
    assert plan["records"] == data["account"]["kept"]
    assert (plan["steps"], plan["device"]) == (metrics["steps"], found["device"])
    where = out if (out / "model.safetensors").exists() else Path(found["parents"][0]["path"])
    if not (where / ADAPTER_CONFIG).exists():
        assert plan["parameters"] == sum(weight.numel() for weight in load_model(where).parameters())
    parts = plan["memory_bytes"]
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
