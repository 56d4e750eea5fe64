"""Models and adapters that a run cannot start from, and runs that cannot be gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmctl.runs import read_manifest
from tests.program import Program
from tests.stages.bad_input import WEIGHTS, Bad, check, snapshot, told, unsealed
from tests.stages.conftest import FEW, TUNE


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A maker of other tensors in `adapter`."""

    def make(here: Path) -> None:
        path = unsealed(here / "adapter") / ADAPTER_WEIGHTS
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return make


def another_base(here: Path) -> None:
    """`adapter` says that `base` is its base, which has other weights than it was trained on."""
    about = read_manifest(here / "adapter")
    about["parents"][0]["path"] = "base"
    (here / "adapter" / "run.json").write_text(json.dumps(about))
    settings = json.loads((here / "adapter" / ADAPTER_CONFIG).read_text())
    (here / "adapter" / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "base"}))
    found = load_file(unsealed(here / "base") / WEIGHTS)
    found["model.norm.weight"][0] += 1
    save_file(found, here / "base" / WEIGHTS, metadata={"format": "pt"})


def no_base(here: Path) -> None:
    another_base(here)
    shutil.rmtree(here / "base")


def quantized(here: Path) -> None:
    path = here / "base" / "config.json"
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": about}))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
MODELS = {
    "an adapter for another base": Bad(
        "{command} adapter {rest}",
        "adapter: base is not the base this adapter was trained on, or has changed since",
        "put the base back, or train the adapter again on this one",
        another_base,
    ),
    "an adapter without a base": Bad(
        "{command} adapter {rest}",
        "adapter: its base base is not there",
        "put it back; a run folder is found by its content anywhere under runs/",
        no_base,
    ),
    "an adapter without weights": Bad(
        "{command} adapter {rest}",
        f"adapter: no {ADAPTER_WEIGHTS}",
        "copy the adapter again",
        lambda here: (unsealed(here / "adapter") / ADAPTER_WEIGHTS).unlink(),
    ),
    "an adapter with a hole": Bad(
        "{command} adapter {rest}",
        f"adapter: the adapter does not fit this base (missing: {FIRST})",
        "copy the adapter again",
        tensors(lambda found: found.pop(FIRST)),
    ),
    "an adapter with another tokenizer": Bad(
        "{command} adapter {rest}",
        "adapter: the chat template is not the one this run was made with",
        "copy it back from the run's parent, or from the folder's last checkpoint",
        lambda here: (here / "adapter" / "chat_template.jinja").write_text("{{ messages }}"),
    ),
    "a quantized model": Bad(
        "{command} base {rest}",
        "base/config.json: quantization_config: the weights are quantized (bitsandbytes), and of quantized ones only compressed-tensors pack-quantized is read",
        "use the model they were made from, and `llmctl quantize` it",
        quantized,
    ),
}
COMMANDS = {
    "sft": f"--data talks.jsonl --out out {' '.join(FEW)}",
    "generate": "Hi",
    "eval": "--answers --data talks.jsonl",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, command: str, talking: Path, llmctl: Program) -> None:
    bad = MODELS[name]
    check(
        Bad(bad.words.format(command=command, rest=COMMANDS[command]), bad.error, bad.hint, bad.make),
        talking,
        llmctl,
    )


# --- resume ------------------------------------------------------------------------------------------

DIFFERENT = "resume with the same recipe, or start a new run with another --out"
WITH = (
    "resume with the same recipe, add --resume-with to go on with the new values, "
    "or start a new run with another --out"
)
PUT_BACK = "put it back, or start a new run with another --out"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("lora.alpha=16", "out: lora.alpha was 32.0 when the run began, and is 16.0 now"),
        ("--qlora", "out: method was 'lora' when the run began, and is 'qlora' now"),
        ("--seed 4", "out: train.seed was 0 when the run began, and is 4 now"),
        ("--template chatml", "out: data.template was 'auto' when the run began, and is 'chatml' now"),
        ("adapter", "out: base was 'base' when the run began, and is 'adapter' now"),
    ],
)
def test_resume_with_another_recipe(words: str, error: str, talking: Path, llmctl: Program) -> None:
    begun(talking, llmctl)
    before = snapshot(talking)
    hint = WITH if words.startswith(("--seed", "--template")) else DIFFERENT
    told(llmctl("sft", "--out", "out", "--resume", *words.split()), Bad(words, error, hint))
    assert snapshot(talking) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "error"),
    [
        ("talks.jsonl", "a cat", "a dog", "out: the train data is not what it was when the run began"),
        ("base/tokenizer_config.json", "{", "{ ", "out: the model is not what it was when the run began"),
    ],
)
def test_resume_with_other_inputs(
    name: str, old: str, new: str, error: str, talking: Path, llmctl: Program
) -> None:
    begun(talking, llmctl)
    path = talking / name
    if path.parent != talking:
        unsealed(path.parent)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    before = snapshot(talking)
    told(llmctl("sft", "--out", "out", "--resume"), Bad(name, error, PUT_BACK))
    assert snapshot(talking) == before


def begun(here: Path, llmctl: Program) -> None:
    """A run `out` that was killed after its first checkpoint."""
    assert llmctl(*TUNE, "--out", "out").code == 0
    shutil.rmtree(here / "out" / "checkpoints" / "step-000006")
    (here / "out" / ADAPTER_WEIGHTS).unlink()
    about = read_manifest(here / "out") | {"status": "running"}
    (here / "out" / "run.json").write_text(json.dumps(about))
