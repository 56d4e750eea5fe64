"""`llmctl quantize`: what is written is what was measured, and what is not good enough is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmctl.kernels.packing import pack_words, unpack_words
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.open import open_folded, open_model
from llmctl.recipe.model import ModelSection
from llmctl.runs import read_manifest
from llmctl.stages import quantize
from tests.program import Program
from tests.stages.bad_input import Bad, Make, cases, check, file
from tests.stages.conftest import VOCABULARY
from tests.stages.test_merge import did

TEXT = ["--calibration", "data.jsonl"]
QUICK = ["compare.answers=1", "compare.max_new_tokens=4", "compare.speed_tokens=8"]
GPTQ = ["--method", "gptq", "--group-size", "16", *TEXT, *QUICK]
NEARLY = ["compare.min_top1=0.9"]  # random weights have many tokens of nearly the same odds
LOOSE = ["compare.min_top1=0", "compare.max_kl=99"]
IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


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
    assert hint == "hint: it is kept in out; the same command with --accept takes it as it is"
    manifest = read_manifest(sharp / "out")
    assert manifest["status"] == "refused" and manifest["metrics"]["kl"] > 1e-9
    used = llmctl("generate", "out", "Adam lives in")
    assert used.code == 1
    assert used.err.splitlines()[-2:] == [
        f"error: out: its own check refused it: {manifest['refused'][0]}",
        "hint: the `llmctl quantize` command that made it accepts it with --accept",
    ]
    monkeypatch.setattr(quantize, "METHODS", {})  # nothing is done again
    found = did(llmctl(*words, "--json", "--accept"))["metrics"]
    assert found["kl"] == manifest["metrics"]["kl"]
    assert read_manifest(sharp / "out")["status"] == "done"
    assert llmctl("generate", "out", "Adam lives in").code == 0


def test_a_result_can_be_accepted_before_it_is_made(sharp: Path, llmctl: Program) -> None:
    words = ["quantize", "sharp", *GPTQ, "compare.max_kl=1e-9", "--out", "out", "--json"]
    did(llmctl(*words, "--accept"))
    assert read_manifest(sharp / "out")["status"] == "done"


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


# --- bad input ---------------------------------------------------------------------------------------

NAMED = "name some with --eval-data FILE or --calibration FILE"
EXPLAINED = "`llmctl recipe show quantize` explains"


def not_finite(name: str, value: float) -> Make:
    """A maker of a model with one weight that is not a finite number, or so large that its products are not."""

    def make(here: Path) -> None:
        path = here / "sharp" / "model.safetensors"
        tensors = load_file(path)
        tensors[name][0] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return make


def packed(here: Path) -> None:
    """`sharp` as a quantized model would say of itself."""
    path = here / "sharp" / "config.json"
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": about}))


def like_gpt2(here: Path) -> None:
    """`sharp` as a model of a family whose tensors have another form."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.15}
    how = {"position": "learned", "norm": "layernorm", "ffn": "gelu_tanh"}
    spec = ModelSection(
        family="gpt2", vocab_size=VOCABULARY, attention_bias="all", mlp_bias=True, **sizes, **how
    )
    save_model(new_model(spec, 3, bos_token_id=1, eos_token_id=[2, 4]), here / "sharp")


BAD = {
    "no MODEL": Bad(
        "quantize", "missing argument MODEL", "name a run folder, a Hugging Face folder or a hub id", code=2
    ),
    "fractional bits": Bad(
        "quantize sharp --bits 3.5",
        "--bits: `3.5` is not a whole number",
        "see `llmctl quantize --help`",
        code=2,
    ),
    "unsupported bits": Bad(
        "quantize sharp --method gptq --bits 5",
        "command line: quantize.bits: `5` is not one of `8`, `4`, `3`",
        f"{EXPLAINED} quantize.bits",
    ),
    "four bits of int8": Bad(
        "quantize sharp --bits 4",
        "command line: quantize: method int8 has 8 bits, not 4; `method: gptq` has 8, 4 or 3",
        f"{EXPLAINED} quantize",
    ),
    "groups of int8": Bad(
        "quantize sharp --group-size 16",
        "command line: quantize: method int8 has one scale a channel; `group_size` belongs to `method: gptq`",
        f"{EXPLAINED} quantize",
    ),
    "a setting that int8 would ignore": Bad(
        "quantize sharp quantize.damping=0.1",
        "command line: quantize: `damping` belongs to `method: gptq`",
        f"{EXPLAINED} quantize",
    ),
    "another method": Bad(
        "quantize sharp --method gpt",
        "command line: quantize.method: `gpt` is not one of `int8`, `gptq`",
        "did you mean `gptq`?",
    ),
    "a group in words": Bad(
        "quantize sharp --method gptq --group-size chanel",
        "command line: quantize.group_size: `chanel` is neither a number of weights nor channel",
        f"{EXPLAINED} quantize.group_size",
    ),
    "no data": Bad("quantize sharp --out out", "no data to measure the receipt on", NAMED),
    "gptq without calibration": Bad(
        "quantize sharp --method gptq --group-size 16 --eval-data data.jsonl --out out",
        "gptq needs text to quantize by",
        "name some with --calibration FILE",
    ),
    "calibration not there": Bad(
        "quantize sharp --calibration dat.jsonl --out out",
        "dat.jsonl: no such file or folder",
        "did you mean `data.jsonl`?",
    ),
    "a group larger than every layer": Bad(
        f"quantize sharp --method gptq {' '.join(TEXT)} --out out",
        "quantize.group_size: 128 is larger than every layer (inputs: 64, 112)",
        "choose a smaller one, such as 32, or group_size=channel",
    ),
    "a group that divides nothing": Bad(
        f"quantize sharp --method gptq --group-size 48 {' '.join(TEXT)} --out out",
        "quantize.group_size: 48 divides no layer (inputs: 64, 112)",
        "choose a smaller one, such as 32, or group_size=channel",
    ),
    "calibration too short": Bad(
        "quantize sharp --method gptq --group-size 16 --calibration short.txt --eval-data data.jsonl --out out",
        "the calibration text has 4 tokens, but the widest layer has 112 inputs",
        "give more text; a hundred times as many tokens is usual",
        file("short.txt", "Hi"),
    ),
    "quantized already": Bad(
        f"quantize sharp {' '.join(TEXT)} --out out",
        "sharp: is quantized already; rounding it again would only lose more",
        "quantize the model it was made from",
        packed,
    ),
    "a family that is not written so": Bad(
        "quantize sharp --calibration dat.jsonl --out out",  # told before anything else
        "gpt2: quantized checkpoints of this architecture are not written",
        "`llmctl convert MODEL --family llmctl` writes it with tensors of Llama's names, which can be",
        like_gpt2,
    ),
    "a weight that is not a number": Bad(
        f"quantize sharp {' '.join(TEXT)} --out out",
        "model.layers.1.mlp.up_proj: the weights are not finite",
        "`llmctl eval` the model; it cannot be any good",
        not_finite("model.layers.1.mlp.up_proj.weight", math.nan),
    ),
    "a reward model": Bad(
        f"quantize sharp {' '.join(TEXT)} --out out",
        "sharp: holds a reward model (LlamaForSequenceClassification), not a language model",
        "`llmctl score` reads it; give a language model here",
        lambda here: (here / "sharp" / "config.json").write_text(
            json.dumps(
                json.loads((here / "sharp" / "config.json").read_text())
                | {"architectures": ["LlamaForSequenceClassification"]}
            )
        ),
    ),
    "out is what a run left that did not finish": Bad(
        f"quantize sharp {' '.join(TEXT)} --out left",
        "left: holds what is left of a run that did not finish",
        "delete it, or choose another --out",
        file("left/run.json", json.dumps({"stage": "quantize", "status": "failed"})),
    ),
    "nothing left to measure on": Bad(
        "quantize sharp --calibration short.txt --out out",
        "too little text to hold any out for evaluation: it fits in one row",
        "give more text, or name some to measure on with --eval-data",
        file("short.txt", "Hi"),
    ),
    "inputs that are not finite": Bad(
        f"quantize sharp {' '.join(TEXT)} --out out",
        "model.layers.0.self_attn.q_proj: its inputs are not finite",
        "the checkpoint is broken, or its numbers are too large even for float32",
        not_finite("model.layers.0.input_layernorm.weight", math.inf),
    ),
    "damping beyond all bounds": Bad(
        "quantize sharp --method gptq quantize.damping=20",
        "command line: quantize.damping: should be less than or equal to 10, not 20",
        f"{EXPLAINED} quantize.damping",
    ),
    "out is occupied": Bad(
        f"quantize sharp {' '.join(TEXT)} --out sharp",
        "sharp: the folder is not empty",
        "choose another --out",
    ),
}


@cases(BAD)
def test_bad_input_is_told_and_changes_nothing(bad: Bad, sharp: Path, llmctl: Program) -> None:
    check(bad, sharp, llmctl)


def test_the_way_round_a_family_that_is_not_written(sharp: Path, llmctl: Program) -> None:
    like_gpt2(sharp)
    did(llmctl("convert", "sharp", "--family", "llmctl", "--out", "ours", "--json"))
    found = did(llmctl("quantize", "ours", *TEXT, *QUICK, *LOOSE, "--out", "out", "--json"))["metrics"]
    assert found["quantized"] == 12 and found["top1"] > 0.8


def test_activations_that_are_not_finite_name_the_layer(sharp: Path, llmctl: Program) -> None:
    not_finite("model.layers.0.mlp.gate_proj.weight", 1e38)(sharp)
    outcome = llmctl("quantize", "sharp", *GPTQ, "--out", "out")
    assert outcome.code == 1
    assert "error: model.layers.0.mlp" in outcome.err and "not finite" in outcome.err
    assert not (sharp / "out" / "model.safetensors").exists()
