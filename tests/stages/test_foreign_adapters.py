"""Adapters that PEFT made, through every command that takes a model: figures and tokens are PEFT's on transformers."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.model.checkpoint import new_model, save_model
from llmctl.model.open import open_model
from llmctl.recipe.model import ModelSection
from tests.program import Outcome, Program
from tests.stages.conftest import FEW, VOCABULARY

QUICK = ["compare.answers=1", "compare.max_new_tokens=4"]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Kind:
    """An adapter: its base's family, its config, new tokens of a tokenizer of its own, whether it comes with one."""

    family: str
    fields: dict[str, Any]
    tied: bool = True
    added: tuple[str, ...] = ()
    has_tokenizer: bool = False


KINDS = {
    "tied-embedding": Kind("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "new-rows": Kind(
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        tied=False,
        added=("<a>", "<b>"),
        has_tokenizer=True,
    ),
    "fused": Kind("phi3", {"target_modules": "all-linear"}, has_tokenizer=True),
}
# quantized checkpoints of a family with tensors of other names are not written
PACKED = {"tied-embedding", "new-rows"}


@pytest.fixture(params=["tied-embedding", "new-rows", pytest.param("fused", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest, here: Path, tok: Path, corpus: Path, talks: Path) -> str:
    """A kind, with the base `b`, its adapter `a` and data in the folder that the program runs in."""
    kind = KINDS[request.param]
    shutil.copytree(tok, here / "b", ignore=shutil.ignore_patterns("run.json", "recipe.yaml"))
    spec = ModelSection(**SIZES, tie_word_embeddings=kind.tied, family=kind.family)
    save_model(new_model(spec, 3, bos_token_id=1, eos_token_id=2), here / "b")
    tokenizer = AutoTokenizer.from_pretrained("b")
    tokenizer.add_tokens(list(kind.added), special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained("b")
    if kind.added:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **kind.fields))
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn(weight.shape) * 0.1)
        adapted.save_pretrained("a")
    if kind.has_tokenizer:
        tokenizer.save_pretrained("a")
    shutil.copy(talks, here / "talks.jsonl")
    # short enough for a row each
    texts = [
        json.loads(line)["text"][:40] + "".join(kind.added) for line in corpus.read_text().splitlines()[:4]
    ]
    (here / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return request.param


def by_peft(kind: Kind) -> tuple[Any, Any]:
    """PEFT's model and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained("a" if kind.has_tokenizer else "b")
    model = AutoModelForCausalLM.from_pretrained("b")
    if kind.added:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, "a").eval(), tokenizer


def did(outcome: Outcome) -> dict[str, Any]:
    """What a command that must have worked printed as JSON."""
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_every_command_is_pefts(kind: str, llmctl: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = by_peft(KINDS[kind])
    prompt = torch.tensor([[1, *tokenizer("The cat", add_special_tokens=False)["input_ids"]]])
    wanted = model.generate(
        input_ids=prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, prompt.shape[1] :].tolist()
    words = ["--temperature", "0", "--max-new-tokens", "8", "--json", "generate.ignore_eos=true"]
    assert did(llmctl("generate", "a", "The cat", *words))["tokens"] == wanted

    loss = did(llmctl("eval", "a", "--data", "data.jsonl", "--json", "eval.dtype=float32"))["loss"]
    nats, count = 0.0, 0
    for line in Path("data.jsonl").read_text().splitlines():
        # new tokens spelled out in a text stay text
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False, split_special_tokens=True)
        row = torch.tensor([[1, *ids["input_ids"], 2]])
        with torch.no_grad():
            logits = model(input_ids=row).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    assert loss == pytest.approx(nats / count, rel=1e-4)

    merged = did(llmctl("merge", "a", "--data", "talks.jsonl", "--out", "m", "--json", *QUICK))["metrics"]
    assert merged["kl"] < 1e-6 and merged["effect"] > 0.01
    assert did(llmctl("eval", "m", "--data", "data.jsonl", "--json", "eval.dtype=float32"))[
        "loss"
    ] == pytest.approx(loss, rel=1e-4)
    same = did(llmctl("compare", "a", "m", "--data", "talks.jsonl", "--json", *QUICK))
    assert same["kl"] < 1e-6 and not same["failed"]
    assert did(llmctl("generate", "m", "The cat", *words))["tokens"] == wanted

    words = ["quantize", "a", "--method", "int8", "--eval-data", "talks.jsonl", "--out", "q", "--json"]
    quantized = llmctl(*words, "compare.max_kl=0.05", "compare.min_top1=0.5")
    assert (quantized.code == 0) is (kind in PACKED), quantized.err
    if kind in PACKED:
        found = did(
            llmctl(
                "compare",
                "a",
                "q",
                "--data",
                "talks.jsonl",
                "--json",
                "--max-kl",
                "0.05",
                "--min-top1",
                "0.5",
                *QUICK,
            )
        )
        assert found["kl"] < 0.05
    assert llmctl("sft", "a", "--data", "talks.jsonl", *FEW, "train.max_steps=2", "--out", "next").code == 0
    assert llmctl("eval", "next", "--data", "data.jsonl").code == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who?\n")))
    assert llmctl("chat", "a", "--max-new-tokens", "4").code == 0


def test_without_a_tokenizer_and_without_a_base(kind: str, llmctl: Program) -> None:
    """The base's tokenizer is used, so what is missing is the base."""
    shutil.rmtree("b")
    outcome = llmctl("eval", "a", "--data", "data.jsonl")
    assert outcome.code == 1 and outcome.err.splitlines()[-2].startswith("error: b: ")


def test_a_tokenizer_that_nobody_has_rows_for(kind: str, llmctl: Program) -> None:
    tokenizer = AutoTokenizer.from_pretrained("b")
    tokenizer.add_tokens([f"<{name}>" for name in "abc"], special_tokens=True)
    tokenizer.save_pretrained("a")
    outcome = llmctl("eval", "a", "--data", "data.jsonl")
    rows = VOCABULARY + len(KINDS[kind].added)
    assert outcome.code == 1 and outcome.err.splitlines()[-2:] == [
        f"error: a: the tokenizer needs {VOCABULARY + 3} rows, but the base and the adapter have {rows}",
        "hint: save the adapter again with PEFT's save_pretrained(..., save_embedding_layers=True)",
    ]


OTHER_FAMILIES = {
    "phi3": {"family": "phi3"},
    "mamba2": {
        "family": "mamba2", "pattern": ["mamba2"], "position": "none", "ffn": "none",
        "ssm": {"state_size": 8, "head_dim": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_what_sft_trains_opens_in_peft_or_the_run_says_that_it_does_not(
    family: str, here: Path, tok: Path, talks: Path, llmctl: Program
) -> None:
    shutil.copytree(tok, here / "b", ignore=shutil.ignore_patterns("run.json", "recipe.yaml"))
    model = new_model(ModelSection(**SIZES | OTHER_FAMILIES[family]), 3, bos_token_id=1, eos_token_id=2)
    save_model(model, here / "b")
    words = [*FEW, "train.max_steps=3", "train.save_steps=2", "data.eval_fraction=0"]
    outcome = llmctl("sft", "b", "--data", str(talks), *words, "--out", "a")
    assert outcome.code == 0, outcome.err
    said = "other programs open the result only once merged: PEFT adapts no `out_proj` of mamba2"
    needs = json.loads(Path("a/run.json").read_text())["needs_merging"]
    assert (said in outcome.err.splitlines()) is (family == "mamba2")
    assert needs == ("PEFT adapts no `out_proj` of mamba2" if family == "mamba2" else None)
    if family == "mamba2":
        return
    ids = torch.arange(20)[None] + 5
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("b"), "a").eval()
    with torch.no_grad():
        wanted, found = theirs(input_ids=ids).logits, open_model("a").eval()(input_ids=ids).logits
        plain = open_model("b").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - plain).abs().max() > 0.01
    # a run that goes on from the middle leaves the same bits
    whole = Path("a/adapter_model.safetensors").read_bytes()
    shutil.rmtree("a/checkpoints/step-000003")
    Path("a/adapter_model.safetensors").unlink()
    about = json.loads(Path("a/run.json").read_text()) | {"status": "running"}
    Path("a/run.json").write_text(json.dumps(about))
    assert llmctl("sft", "--out", "a", "--resume").code == 0
    assert Path("a/adapter_model.safetensors").read_bytes() == whole
