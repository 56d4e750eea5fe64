"""`llmctl quantize`: what is written is what was measured, and what is not good enough is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmctl.kernels.packing import pack_words, unpack_words
from llmctl.model.open import open_folded, open_model
from llmctl.runs import read_manifest
from llmctl.stages import quantize
from tests.program import Program
from tests.stages.conftest import VOCABULARY
from tests.stages.test_merge import did

TEXT = ["--calibration", "data.jsonl"]
QUICK = ["compare.answers=1", "compare.max_new_tokens=4", "compare.speed_tokens=8"]
GPTQ = ["--method", "gptq", "--group-size", "16", *TEXT, *QUICK]
NEARLY = ["compare.min_top1=0.9"]  # random weights have many tokens of nearly the same odds
LOOSE = ["compare.min_top1=0", "compare.max_kl=99"]
IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def test_the_receipt_of_int8(sharp: Path, llmctl: Program) -> None:
    found = did(llmctl("quantize", "sharp", *TEXT, *QUICK, *NEARLY, "--out", "out", "--json"))["metrics"]
    assert found["bits_per_weight"] == pytest.approx(
        8 + 32 * (1 / 64), abs=0.3
    )  # a scale for 64 or 112 codes
    assert found["size_bytes"] < found["size_bytes_before"] and found["kept"] == ["lm_head"]
    assert found["quantized"] == 14 and "fbgemm int8" in found["path"]
    assert 0.9 <= found["top1"] < 1 and 0 < found["kl"] < 0.01
    assert found["perplexity"] == pytest.approx(found["perplexity_before"], rel=0.02)
    assert found["tokens_per_second"] > 0 and found["tokens_per_second_before"] > 0
    manifest = read_manifest(sharp / "out")
    assert manifest["status"] == "done" and manifest["metrics"]["top1"] == found["top1"]
    assert manifest["data"]["train"]["sources"] == manifest["data"]["eval"]["sources"] == ["data.jsonl"]
    assert manifest["data"]["train"]["fingerprint"] != manifest["data"]["eval"]["fingerprint"]
    card = (sharp / "out" / "README.md").read_text()
    assert f"{found['top1']:.2%}" in card and "| perplexity |" in card and found["path"] in card


def test_calibration_text_makes_int8_nearer(sharp: Path, llmctl: Program) -> None:
    """It is GPTQ at 8 bits, on the beginning of the text, and nearer than each weight to its nearest code."""
    gptq, few = ["--method", "gptq", "--bits", "8", *TEXT], ["quantize.calibration_rows=8"]
    methods = {
        "nearest": ["--method", "int8"],
        "int8": ["--method", "int8", *TEXT],
        "gptq": gptq,
        "int8-few": ["--method", "int8", *TEXT, *few],
        "gptq-few": [*gptq, *few],
    }
    kl = {}
    for name, method in methods.items():
        words = ["quantize", "sharp", *method, "--eval-data", "data.jsonl", *QUICK, *LOOSE, "--out", name]
        kl[name] = did(llmctl(*words, "--json"))["metrics"]["kl"]
    assert kl["int8"] < 0.8 * kl["nearest"]
    assert kl["int8"] == pytest.approx(kl["gptq"], rel=0.5)
    assert kl["int8-few"] == kl["gptq-few"] != kl["int8"]


def test_int8_says_when_the_calibration_text_is_too_short_to_help(sharp: Path, llmctl: Program) -> None:
    short = ["quantize.calibration_rows=1", "compare.max_length=16"]
    ended = llmctl("quantize", "sharp", "--method", "int8", *TEXT, *short, *QUICK, *LOOSE, "--out", "out")
    assert ended.code == 0, ended.err
    assert "tokens, fewer than the 112 inputs of the widest layer; each weight is rounded" in ended.err


@pytest.mark.parametrize("bits", ["8", "4", "3"])
def test_gptq_is_written_as_it_is_measured_and_opens_in_transformers(
    sharp: Path, llmctl: Program, bits: str
) -> None:
    words = ["quantize", "sharp", *GPTQ, "--bits", bits, *LOOSE, "--out", "out", "--json"]
    found = did(llmctl(*words))["metrics"]
    assert found["bits"] == int(bits)
    assert found["bits_per_weight"] == pytest.approx(int(bits) + 2, abs=0.3)  # a scale for 16 codes
    theirs = AutoModelForCausalLM.from_pretrained(sharp / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(open_model("out", exact=True)), logits(theirs), rtol=1e-4, atol=1e-4)


def test_fewer_bits_diverge_more(sharp: Path, llmctl: Program) -> None:
    divergence = [
        did(llmctl("quantize", "sharp", *GPTQ, "--bits", bits, *LOOSE, "--out", f"b{bits}", "--json"))[
            "metrics"
        ]["kl"]
        for bits in ("8", "4", "3")
    ]
    assert divergence == sorted(divergence) and divergence[0] < divergence[2] / 10


def test_layers_that_the_group_does_not_divide_stay_whole_and_are_listed(
    sharp: Path, llmctl: Program
) -> None:
    words = ["--method", "gptq", "--group-size", "64", *TEXT, *QUICK, *LOOSE, "--out", "out"]
    outcome = llmctl("quantize", "sharp", *words)
    assert outcome.code == 0, outcome.err
    kept = read_manifest(sharp / "out")["metrics"]["kept"]
    assert kept == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)] + ["lm_head"]
    assert f"in full          {', '.join(kept)}" in outcome.out
    whole = load_file(sharp / "sharp" / "model.safetensors")
    for name in kept[:2]:
        assert torch.equal(
            load_file(sharp / "out" / "model.safetensors")[f"{name}.weight"], whole[f"{name}.weight"]
        )


def test_what_is_too_far_away_is_kept_but_refused_until_it_is_accepted(
    sharp: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "quantize",
        "sharp",
        *GPTQ,
        "--bits",
        "3",
        "compare.min_top1=0",
        "compare.max_kl=1e-9",
        "--out",
        "out",
    ]
    outcome = llmctl(*words)
    error, hint = outcome.err.splitlines()[-2:]
    assert outcome.code == 3
    assert error.startswith("error: the quantized model is not what sharp is: divergence 0.")
    assert error.endswith(" is above 1e-09 nats per token")
    assert hint == "hint: it is kept; the same command with --out out --accept takes it as it is"
    card = (sharp / "out" / "README.md").read_text()
    assert "**Its own check refuses it**: divergence 0." in card
    again = llmctl(*words).err.splitlines()[-2:]
    assert again == [
        "error: out: holds a result that its own check refused",
        "hint: add --accept to take it as it is, or choose another --out",
    ]
    assert "its own check refused it" in llmctl("sft", "out", "--data", "talks.jsonl", "--dry-run").err
    manifest = read_manifest(sharp / "out")
    assert manifest["status"] == "refused" and manifest["metrics"]["kl"] > 1e-9
    used = llmctl("generate", "out", "Adam lives in")
    assert used.code == 1
    assert used.err.splitlines()[-2:] == [
        f"error: out: its own check refused it: {manifest['refused'][0]}",
        "hint: the `llmctl quantize` command that made it takes it with --out out --accept",
    ]
    monkeypatch.setattr(quantize, "METHODS", {})  # nothing is done again
    found = did(llmctl(*words, "--json", "--accept"))["metrics"]
    assert found["kl"] == manifest["metrics"]["kl"]
    accepted = read_manifest(sharp / "out")
    assert accepted["status"] == "done" and accepted["accepted"] and accepted["refused"]
    assert llmctl("generate", "out", "Adam lives in").code == 0


def test_what_has_changed_since_it_was_refused_is_not_accepted(sharp: Path, llmctl: Program) -> None:
    words = ["quantize", "sharp", *TEXT, *QUICK, "compare.min_top1=0", "compare.max_kl=0", "--out", "out"]
    assert llmctl(*words).code == 3
    changes = {
        "out": "error: out: has changed since its check refused it",
        "sharp": "error: out: the model is not what it was when the run began",
    }
    for folder, error in changes.items():
        config = sharp / folder / "generation_config.json"
        before = config.read_bytes()
        config.write_bytes(before + b" ")
        assert error in llmctl(*words, "--accept").err
        config.write_bytes(before)
    assert llmctl("quantize", "./sharp", *words[2:], "--accept", "quantize.threads=1").code == 0


def test_a_result_can_be_accepted_before_it_is_made(sharp: Path, llmctl: Program) -> None:
    words = ["quantize", "sharp", *GPTQ, "compare.max_kl=1e-9", "--out", "out", "--json"]
    outcome = llmctl(*words, "--accept")
    did(outcome)
    assert "accepted, though its check refuses it: divergence 0." in outcome.err
    manifest = read_manifest(sharp / "out")
    assert manifest["status"] == "done" and manifest["accepted"] and manifest["refused"]


def test_a_fault_in_one_layer_is_found_by_what_was_to_be_written(
    sharp: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far from the original it may be, the file must be what the codes stand for."""
    usual = quantize.save_quantized

    def damaged(model: Any, matrices: Any, scheme: Any, folder: Path) -> None:
        usual(model, matrices, scheme, folder)
        tensors = load_file(folder / "model.safetensors")
        name = f"{Q}.weight_zero_point"
        zero = unpack_words(tensors[name].t().contiguous(), 4, 64)
        tensors[name] = pack_words((zero + 1).clamp(-8, 7), 4).t().contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(quantize, "save_quantized", damaged)
    outcome = llmctl("quantize", "sharp", *GPTQ, "quantize.symmetric=false", *LOOSE, "--out", "out")
    assert outcome.code == 3
    assert "what was read back is not what was written: " in outcome.err.splitlines()[-2]
    assert read_manifest(sharp / "out")["status"] == "refused"


def test_an_adapter_is_folded_in(talking: Path, llmctl: Program) -> None:
    words = ["quantize", "adapter", "--eval-data", "talks.jsonl", *QUICK, *LOOSE, "--out", "out", "--json"]
    found = did(llmctl(*words))["metrics"]
    with torch.no_grad():
        wanted = open_folded("adapter").model.layers[0].mlp.up_proj.weight
    packed = load_file(talking / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    codes = unpack_words(packed[f"{name}.weight_packed"], 8, wanted.shape[1]).float()
    assert (
        float((codes * packed[f"{name}.weight_scale"] - wanted).abs().max()) < float(wanted.abs().max()) / 100
    )
    assert found["stop_rate_a"] is not None


def test_the_quantized_model_is_used_everywhere(sharp: Path, llmctl: Program) -> None:
    did(llmctl("quantize", "sharp", *TEXT, *QUICK, *NEARLY, "--out", "out", "--json"))
    scored = [did(llmctl("eval", model, "--data", "data.jsonl", "--json")) for model in ("sharp", "out")]
    assert scored[1]["bits_per_byte"] == pytest.approx(scored[0]["bits_per_byte"], rel=0.02)
    said = llmctl("generate", "out", "Adam lives in", "--max-new-tokens", "5", "--temperature", "0")
    assert said.code == 0 and said.out.strip()
    assert did(
        llmctl(
            "compare", "sharp", "out", "--data", "data.jsonl", "--json", *QUICK[:2], "compare.min_top1=0.9"
        )
    )


# --- faults planted in the file ----------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def transposed_scales(tensors: Tensors) -> None:
    """The groups of a layer as if the file held them the other way round, for every square layer."""
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        scale = tensors[name]
        tensors[name] = scale.t().reshape(scale.shape).contiguous()


def one_zero_too_far(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("weight_zero_point")]:
        outputs = tensors[name.replace("zero_point", "scale")].shape[0]
        zero = unpack_words(tensors[name].t().contiguous(), 4, outputs)
        tensors[name] = pack_words((zero + 1).clamp(-8, 7), 4).t().contiguous()


FAULTS: dict[str, tuple[list[str], Callable[[Tensors], None]]] = {
    "scales of the groups transposed": ([], transposed_scales),
    "zero points off by one": (["quantize.symmetric=false"], one_zero_too_far),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_finds_a_fault_planted_in_the_file(sharp: Path, llmctl: Program, name: str) -> None:
    how, plant = FAULTS[name]
    found = did(llmctl("quantize", "sharp", *GPTQ, *how, *LOOSE, "--out", "out", "--json"))["metrics"]
    # as far from the original as it was measured to be, and half as much again
    bounds = [f"compare.min_top1={found['top1'] * 0.9}", f"compare.max_kl={found['kl'] * 1.5}"]
    compare = ["compare", "sharp", "out", "--data", "data.jsonl", *QUICK[:2], *bounds]
    good = llmctl(*compare)
    assert good.code == 0, good.err
    tensors = load_file(sharp / "out" / "model.safetensors")
    plant(tensors)
    save_file(tensors, sharp / "out" / "model.safetensors", metadata={"format": "pt"})
    outcome = llmctl(*compare)
    assert outcome.code == 3 and "error: out is not what sharp is: " in outcome.err
