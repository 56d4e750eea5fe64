"""`llmctl quantize` on bad input: what it says, and that nothing is changed."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors.torch import load_file, save_file

from llmctl.model.checkpoint import new_model, save_model
from llmctl.recipe.model import ModelSection
from tests.program import Program
from tests.stages.bad_input import Bad, Make, cases, check, file
from tests.stages.conftest import VOCABULARY
from tests.stages.test_merge import did
from tests.stages.test_quantize import GPTQ, LOOSE, QUICK, TEXT

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
        "choose a smaller one, such as 32, or quantize.group_size=channel",
    ),
    "a group that divides nothing": Bad(
        f"quantize sharp --method gptq --group-size 48 {' '.join(TEXT)} --out out",
        "quantize.group_size: 48 divides no layer (inputs: 64, 112)",
        "choose a smaller one, such as 32, or quantize.group_size=channel",
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
