"""`llmctl merge` and `compare`: what is written is what was trained, and what is not is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmctl.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.nf4 import round_nf4
from llmctl.model.open import open_folded, open_model
from llmctl.recipe.load import load_recipe
from llmctl.recipe.tune import SftRecipe
from llmctl.runs import folder_hash, read_manifest
from llmctl.stages import merge, sft
from llmctl.talk import SILENT
from tests.program import Outcome, Program
from tests.stages.bad_input import WEIGHTS, Bad, snapshot, told
from tests.stages.conftest import FEW, VOCABULARY

QUICK = ["compare.answers=1", "compare.max_new_tokens=4"]
Tensors = dict[str, torch.Tensor]
IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sharp(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with opinions: random weights ten times as large as those of a new one."""
    out = tmp_path_factory.mktemp("sharp") / "sharp"
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("run.json", "recipe.yaml", "checkpoints"))
    spec = load_model(base).config.spec.model_copy(update={"initializer_range": 0.2})
    save_model(new_model(spec, 3, bos_token_id=1, eos_token_id=[2, 4]), out)
    return out


@pytest.fixture(scope="module")
def trained(sharp: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `sft` run on it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = {"data.train": [str(talks)], "base": str(sharp), "out": str(out)}
    sft.run(load_recipe(SftRecipe, None, flags, FEW), SILENT)
    return out


@pytest.fixture
def room(here: Path, trained: Path, sharp: Path, talks: Path, corpus: Path) -> Path:
    """The folder the program runs in, with copies: the run `run`, its base `sharp` and `talks.jsonl`."""
    shutil.copytree(trained, here / "run")
    shutil.copytree(sharp, here / "sharp")
    shutil.copy(talks, here / "talks.jsonl")
    shutil.copy(corpus, here / "data.jsonl")
    return here


def did(outcome: Outcome) -> dict[str, Any]:
    """What a command that must have worked printed as JSON."""
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def changed(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors of a file in place."""
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


# --- what is merged is what was trained --------------------------------------------------------------

FIGURES = [
    "top1", "kl", "kl_error", "max_kl", "perplexity_a", "perplexity_b", "tokens", "rows", "stop_rate_a",
    "stop_rate_b", "same_answers", "folded_kl", "written_kl", "allowed_kl",
]  # fmt: skip


def test_the_merged_model_is_the_adapter(room: Path, llmctl: Program) -> None:
    before = snapshot(room)
    outcome = llmctl("merge", "run", "--out", "out", "--json", "compare.max_new_tokens=9")
    found = did(outcome)
    assert {name: kind for name, kind in snapshot(room).items() if not name.startswith("out")} == before
    assert {path.name for path in (room / "out").iterdir()} == {
        "run.json", "recipe.yaml", "config.json", WEIGHTS, "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert list(found) == ["run", "metrics"] and list(found["metrics"]) == [*FIGURES, "effect", "answers"]
    metrics = found["metrics"]
    assert metrics["top1"] == 1 and metrics["kl"] < 1e-6 and metrics["effect"] > 0.05
    assert metrics["same_answers"] == 1 and len(metrics["answers"]) == 8
    assert f"the adapter moves its base by {metrics['effect']:.4g} nats per token\n" in outcome.err

    base = AutoModelForCausalLM.from_pretrained(room / "sharp")
    theirs = PeftModel.from_pretrained(base, room / "run")
    expected = logits(theirs)
    for merged in (load_model("out"), AutoModelForCausalLM.from_pretrained("out"), theirs.merge_and_unload()):
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((room / "out" / "config.json").read_text())["eos_token_id"] == [2, 4]


def test_manifest(room: Path, llmctl: Program) -> None:
    did(llmctl("merge", "run", "--out", "out", "--json", *QUICK))
    found, adapter = read_manifest(room / "out"), read_manifest(room / "run")
    assert (found["stage"], found["status"], found["error"]) == ("merge", "done", None)
    assert found["parents"] == [{"role": "model", "path": "run", "hash": adapter["hash"]}]
    assert found["hash"] == folder_hash(room / "out")
    for name in ("tokenizer", "template", "stop_ids"):
        assert found[name] == adapter[name]
    assert found["metrics"]["top1"] == 1 and "answers" not in found["metrics"]
    again = llmctl("merge", "--recipe", "out/recipe.yaml", "--out", "again", "--json")
    assert did(again)["run"] == "again" and read_manifest(room / "again")["hash"] == found["hash"]


def test_the_result_is_a_model_like_any_other(room: Path, llmctl: Program) -> None:
    did(llmctl("merge", "run", "--out", "out", "--json", *QUICK))
    words = ["--chat", "--temperature", "0", "--max-new-tokens", "9", "--json"]
    one, two = (did(llmctl("generate", name, "Who?", *words))["tokens"] for name in ("run", "out"))
    assert one == two
    assert llmctl("sft", "out", "--data", "talks.jsonl", *FEW, "--out", "next").code == 0
    refused = llmctl("merge", "out", "--out", "twice")
    message = "out: not an adapter, so there is nothing to merge"
    told(refused, Bad("", message, "name the folder of an `sft --lora` run"))


def test_a_listing_for_people(room: Path, llmctl: Program) -> None:
    shown = llmctl(
        "merge", "run", "--out", "out", "compare.answers=2", "compare.max_new_tokens=4"
    ).out.splitlines()
    assert [line.split()[0] for line in shown[: len(FIGURES) + 2]] == ["run", *FIGURES, "effect"]
    assert shown[0].split() == ["run", "out"] and shown[1].split() == ["top1", "1"]
    assert [line for line in shown if line.startswith("prompt ")][1].startswith("prompt 2  <|bos|>")
    assert len([line for line in shown if line.startswith("  both  ")]) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "auto"])
def test_precision(dtype: str, room: Path, llmctl: Program) -> None:
    """`auto` is the base's own; the merged weights are rounded to it once."""
    if dtype == "auto":
        save_model(load_model("sharp", torch.bfloat16), room / "sharp")
        manifest = read_manifest(room / "run")
        manifest["parents"][0] |= {"path": "sharp", "hash": folder_hash(room / "sharp")}
        (room / "run" / "run.json").write_text(json.dumps(manifest))
    found = did(
        llmctl("merge", "run", "--out", "out", "--dtype", dtype, "--json", "compare.min_top1=0.9", *QUICK)
    )
    wanted = "float32" if dtype == "float32" else "bfloat16"
    assert json.loads((room / "out" / "config.json").read_text())["dtype"] == wanted
    expected = open_folded("run", torch.float32)
    for name, weight in load_file(room / "out" / WEIGHTS).items():
        assert torch.equal(weight, expected.get_parameter(name).to(getattr(torch, wanted))), name
    assert (found["metrics"]["kl"] > 1e-7) is (wanted == "bfloat16")


def test_an_adapter_trained_on_four_bits(room: Path, llmctl: Program) -> None:
    """It belongs to the rounded base, and that is what it is folded into."""
    assert llmctl("sft", "sharp", "--qlora", "--data", "talks.jsonl", *FEW, "--out", "q").code == 0
    outcome = llmctl("merge", "q", "--out", "out", "--json", *QUICK)
    assert did(outcome)["metrics"]["top1"] == 1
    said = "the adapter was trained on a base in NF4: it is folded into that base, written out in full\n"
    assert said in outcome.err
    rounded = load_model("sharp")
    round_nf4(rounded)
    expected = logits(PeftModel.from_pretrained(rounded, room / "q"))
    torch.testing.assert_close(logits(load_model("out")), expected, atol=1e-4, rtol=1e-4)
    weights = load_file(room / "out" / WEIGHTS)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert "quantization_config" not in json.loads((room / "out" / "config.json").read_text())
    whole = llmctl("compare", "run", "out", "--data", "talks.jsonl", "--max-kl", "1e-3", "--json", *QUICK)
    assert whole.code == 3  # and not the adapter that was trained in full precision


def test_an_adapter_on_an_adapter(room: Path, llmctl: Program) -> None:
    assert llmctl("sft", "run", "--data", "talks.jsonl", *FEW, "lora.alpha=64", "--out", "two").code == 0
    assert did(llmctl("merge", "two", "--out", "out", "--json", *QUICK))["metrics"]["top1"] == 1
    torch.testing.assert_close(logits(load_model("out")), logits(open_model("two")), atol=1e-4, rtol=1e-4)


# --- what is not is found out ------------------------------------------------------------------------


def test_a_dead_adapter(room: Path, llmctl: Program) -> None:
    """As it was before the first step: its second matrices are zero."""

    def dead(found: Tensors) -> None:
        for name, weight in found.items():
            if "lora_B" in name:
                weight.zero_()

    changed(room / "run" / ADAPTER_WEIGHTS, dead)
    before = snapshot(room)
    message = "run: the adapter changes nothing: 0 nats per token against its base"
    hint = "train it longer or with a higher train.learning_rate; compare.min_effect sets the bound"
    told(llmctl("merge", "run", "--out", "out", *QUICK), Bad("", message, hint, code=3))
    assert snapshot(room) == before
    assert llmctl("merge", "run", "--out", "out", "compare.min_effect=0", *QUICK).code == 0


@pytest.mark.parametrize("alpha", [16, 64])
def test_a_wrong_scale(alpha: int, room: Path, llmctl: Program) -> None:
    """Merged by another tool, which took another alpha."""
    shutil.copytree(room / "run", room / "wrong")
    path = room / "wrong" / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
    merged = open_folded("wrong", torch.float32)
    shutil.copytree(room / "sharp", room / "merged")
    save_model(merged, room / "merged")
    words = ["compare", "run", "merged", "--data", "talks.jsonl", "--json", *QUICK]
    outcome = llmctl(*words)
    drifted(outcome, "merged is not what run is: ")
    assert llmctl(*words, "--min-top1", "0", "--max-kl", "99").code == 0


def test_a_fold_of_a_slightly_wrong_scale(
    room: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before rounding, which hides it; rounding a right fold is no fault, however few the tokens."""
    coarse = ["--dtype", "bfloat16", "compare.max_rows=1", *QUICK]
    found = did(llmctl("merge", "run", "--out", "right", "--json", *coarse))["metrics"]
    assert found["folded_kl"] < 1e-6 and found["written_kl"] < 1e-6 < found["kl"]
    usual = merge.open_folded

    def scaled(folder: Path, dtype: torch.dtype) -> Any:
        model, base = usual(folder, dtype), load_model("sharp", dtype)
        for name, weight in model.named_parameters():
            weight.data.lerp_(base.get_parameter(name).data, -0.25)
        return model

    monkeypatch.setattr(merge, "open_folded", scaled)
    outcome = llmctl("merge", "run", "--out", "out", *coarse)
    drifted(outcome, "the merged model is not what run is: before rounding: ", prints=False)


def drifted(outcome: Outcome, begins: str, prints: bool = True) -> None:
    """Assert that a check failed, and that its figures were printed all the same."""
    assert outcome.code == 3 and bool(outcome.out) is prints
    error, hint = outcome.err.splitlines()[-2:]
    assert error.startswith(f"error: {begins}"), error
    assert "is below 0.99" in error or " nats per token" in error
    kept = "hint: it is kept; the same command with --out out --accept takes it as it is"
    allowed = "hint: if that is expected, allow it with compare.min_top1 and compare.max_kl"
    assert hint == (allowed if prints else kept)
    if prints:
        assert json.loads(outcome.out)["failed"]


def flipped(seed: int) -> Callable[[Path], None]:
    """A bit of each hundredth weight of a file turned over, at random."""

    def flip(path: Path) -> None:
        random = np.random.default_rng(seed)

        def turn(found: Tensors) -> None:
            for weight in found.values():
                bits = weight.numpy().reshape(-1).view(np.uint32)
                chosen = random.random(bits.size) < 0.01
                bits[chosen] ^= np.uint32(1) << random.integers(0, 32, chosen.sum(), dtype=np.uint32)

        changed(path, turn)

    return flip


def poisoned(path: Path) -> None:
    """A NaN in a file."""
    changed(path, lambda found: found["model.layers.0.mlp.up_proj.weight"].view(-1)[7:8].fill_(torch.nan))


DAMAGE = {"flipped 0": flipped(0), "flipped 1": flipped(1), "flipped 2": flipped(2), "NaN": poisoned}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_a_merged_file(how: str, room: Path, llmctl: Program) -> None:
    did(llmctl("merge", "run", "--out", "out", "--json", *QUICK))
    DAMAGE[how](room / "out" / WEIGHTS)
    drifted(
        llmctl("compare", "run", "out", "--data", "talks.jsonl", "--json", *QUICK), "out is not what run is: "
    )


@pytest.mark.parametrize("how", ["flipped 0", "NaN"])
def test_damage_on_the_way_to_the_disk(
    how: str, room: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read back counts; nobody uses it by accident."""
    usual = merge.save_model

    def damaged(model: Any, folder: Path) -> None:
        usual(model, folder)
        DAMAGE[how](folder / WEIGHTS)

    monkeypatch.setattr(merge, "save_model", damaged)
    drifted(
        llmctl("merge", "run", "--out", "out", *QUICK), "the merged model is not what run is: ", prints=False
    )
    manifest = read_manifest(room / "out")
    assert manifest["status"] == "refused" and manifest["refused"]
    assert "its own check refused it" in llmctl("generate", "out", "Hi").err


def test_a_poisoned_adapter(room: Path, llmctl: Program) -> None:
    changed(
        room / "run" / ADAPTER_WEIGHTS,
        lambda found: sorted(found.items())[3][1].view(-1)[:1].fill_(torch.nan),
    )
    before = snapshot(room)
    name = sorted(load_file(room / "run" / ADAPTER_WEIGHTS))[3]
    message = f"run: the adapter holds numbers that are not finite, in {name}"
    hint = "train it again with a lower train.learning_rate, or use a checkpoint of the run"
    for words in ("merge run --out out", "generate run Hi", "sft run --data talks.jsonl --out out"):
        told_last(llmctl(*words.split()), message, hint)
        assert snapshot(room) == before


def told_last(outcome: Outcome, message: str, hint: str) -> None:
    assert outcome.code == 3 and outcome.err.splitlines()[-2:] == [f"error: {message}", f"hint: {hint}"], (
        outcome.err
    )


def test_a_poisoned_base(room: Path, llmctl: Program) -> None:
    """A foreign adapter, whose base is taken as it is."""
    (room / "run" / "run.json").unlink()
    path = room / "run" / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "sharp"}))
    poisoned(room / "sharp" / WEIGHTS)
    outcome = llmctl("merge", "run", "--out", "out", "--data", "talks.jsonl")
    told_last(
        outcome,
        "run: the odds its base or the adapter gives are not numbers",
        "is the base any good? `llmctl eval` it",
    )
    assert not (room / "out").exists()
