"""Contracts on a real chat model, SmolLM2-135M-Instruct. The oracle is transformers, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.data.batches import eval_batches
from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.evaluate.perplexity import score
from llmctl.kernels.device import Compute
from llmctl.model.open import open_model
from llmctl.recipe.tune import SftData
from llmctl.runs import read_manifest
from llmctl.stages.generate import load_for_generation
from llmctl.stages.rows import read_rows
from llmctl.talk import SILENT
from llmctl.tokenizer.load import encode_batch, load_tokenizer
from llmctl.tokenizer.render import Renderer
from tests.program import Program
from tests.real.samples import CONVERSATIONS, RECORDS, TEXTS, prose, write_lines

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

FLOAT = Compute(torch.device("cpu"), torch.float32)
QUESTION = "What is the capital of France?"
# two programs may order two tokens differently when their logits are this near
TIE = 1e-3
# What a right result keeps to. On an encyclopedia bfloat16 alone costs this model a KL of 0.0010, and 8 bits 0.0030;
# on other text both are larger, so 8 bits are held against bfloat16 on the same text.
MERGE_KL = 0.02  # of an adapter that moves its base by more than 0.2
INT8_KL_OVER_BF16, INT8_TOP1_UNDER_BF16 = 3.0, 0.01
PATH_KL = 1e-4  # of the operators of `llmctl chat` against exact ones, with the same weights


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Any:
    return open_model(smollm2, torch.float32)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(str(smollm2))


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """A conversation's prompt, and the beginnings of two texts."""
    renderer = Renderer(tokenizer)
    return [
        renderer.prompt_ids(CONVERSATIONS[0]),
        *encode_batch(tokenizer, [text[:300] for text in prose()[:2]]),
    ]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("records") / "records.jsonl", RECORDS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [{"text": text} for text in prose()[:16]]
    return write_lines(tmp_path_factory.mktemp("pages") / "pages.jsonl", texts)


def nats(model: Any, ids: list[int], first: int = 1) -> torch.Tensor:
    """What transformers' model pays for each id from `first` on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(ids[first:]), reduction="none")


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL(a, b) in nats per place of logits [T, V]."""
    return float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean"))


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of places at which both prefer the same token."""
    return float((a.argmax(-1) == b.argmax(-1)).float().mean())


# --- the model ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_transformers(ours: Any, theirs: Any, prompts: list[list[int]]) -> None:
    for ids in prompts:
        found, expected = (model(torch.tensor([ids])).logits[0].float() for model in (ours, theirs))
        assert divergence(expected, found) <= 1e-7
        best, second = expected.topk(2).values.unbind(-1)
        clear = best - second > TIE
        assert clear.float().mean() > 0.95
        assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_by_transformers(
    ours: Any, theirs: Any, prompts: list[list[int]]
) -> None:
    for ids in prompts:
        found = list(generate(ours, ids, 16, likeliest))
        assert len(found) == 16
        logits = theirs(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1]
        assert torch.all(logits.gather(-1, torch.tensor(found)[:, None])[:, 0] >= logits.max(-1).values - TIE)


def test_eval_gives_the_perplexity_of_transformers(
    smollm2: Path, theirs: Any, tokenizer: Any, pages: Path, llmctl: Program, tmp_path: Path
) -> None:
    cache = f"eval.cache_dir={tmp_path}"
    ended = llmctl("eval", str(smollm2), "--data", str(pages), "--json", "eval.dtype=float32", cache)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    texts = [json.loads(line)["text"] for line in pages.read_text(encoding="utf-8").splitlines()]
    paid = torch.cat([nats(theirs, begin + ids + end) for ids in encode_batch(tokenizer, texts)])
    assert found["tokens"] == len(paid) > 1000
    assert found["loss"] == pytest.approx(float(paid.mean()), rel=1e-5)


# --- text and ids ------------------------------------------------------------------------------------


def test_the_tokenizer_gives_every_text_back(smollm2: Path, tokenizer: Any) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    for text, ids in zip(TEXTS, encode_batch(tokenizer, TEXTS), strict=True):
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_prompts_equal_transformers(smollm2: Path, tokenizer: Any) -> None:
    theirs, renderer = AutoTokenizer.from_pretrained(smollm2), Renderer(tokenizer)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert renderer.prompt_ids(messages) == expected


@torch.no_grad()
def test_packed_padded_and_alone_cost_the_same(ours: Any, theirs: Any, tokenizer: Any, records: Path) -> None:
    found = {}
    for packing in (True, False):
        data = SftData(train=[str(records)], packing=packing)
        rows = read_rows(data.train, data, tokenizer, 256, SILENT)
        batches = eval_batches(rows.laid, batch_size=4, pad_id=tokenizer.pad_token_id)
        sums = score(ours, batches, 0.0, FLOAT)
        found[packing] = sums.nats
        assert (len(rows.laid.rows) < len(RECORDS)) is packing
        assert sums.tokens == rows.laid.trained_tokens > 100
    alone = 0.0
    for one in RECORDS:
        asked = "\n\n".join(part for part in (one["instruction"], one["input"]) if part)
        prompt = [{"role": "user", "content": asked}]
        begin = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer = encode_batch(tokenizer, [one["output"]])[0] + [tokenizer.eos_token_id]
        alone += float(nats(theirs, begin + answer, len(begin)).sum())
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert found[True] == pytest.approx(alone, rel=1e-5)


# --- the commands ------------------------------------------------------------------------------------


def ask(model: Path) -> str:
    """What `llmctl chat` prints to the question, from a pipe."""
    words = [
        sys.executable,
        "-m",
        "llmctl",
        "chat",
        str(model),
        "--temperature",
        "0",
        "--max-new-tokens",
        "24",
    ]
    ended = subprocess.run(words, input=QUESTION + "\n", capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_chat_knows_a_capital(smollm2: Path) -> None:
    assert "Paris" in ask(smollm2)


def test_an_adapter_is_trained_and_merged(
    smollm2: Path, records: Path, llmctl: Program, tmp_path: Path
) -> None:
    """A right merge of a bfloat16 model passes the gate, whose bounds are those of `llmctl merge`."""
    steps = ["--max-steps", "3", "train.per_device_train_batch_size=4", "train.logging_steps=1"]
    rest = ["data.eval_fraction=0", "data.max_length=256", "train.learning_rate=1e-3", "train.threads=1"]
    words = ["sft", str(smollm2), "--data", str(records), "--lora", "--out", str(tmp_path / "sft")]
    ended = llmctl(*words, *steps, *rest)
    assert ended.code == 0, ended.err
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(losses) == 3 and all(0 < loss < 6 for loss in losses)
    merged = llmctl("merge", str(tmp_path / "sft"), "--out", str(tmp_path / "merged"), "compare.answers=0")
    assert merged.code == 0, merged.err
    metrics = read_manifest(tmp_path / "merged")["metrics"]
    assert metrics["effect"] > 0.2 and metrics["kl"] <= MERGE_KL
    assert "Paris" in ask(tmp_path / "merged")


@torch.no_grad()
def test_int8_is_lossless_in_practice(
    smollm2: Path, theirs: Any, tokenizer: Any, pages: Path, llmctl: Program, tmp_path: Path
) -> None:
    """On the path that `llmctl chat` runs, against transformers' model in float32 and in bfloat16."""
    out = tmp_path / "int8"
    few = ["compare.max_rows=4", "compare.max_length=256", "compare.answers=0", "compare.speed_tokens=8"]
    words = ["quantize", str(smollm2), "--method", "int8", "--eval-data", str(pages), "--out", str(out)]
    ended = llmctl(*words, *few)
    assert ended.code == 0, ended.err
    rounded = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()
    path, exact = (
        load_for_generation(str(out), "auto", "auto", "device"),
        open_model(out, torch.float32, exact=True),
    )
    ids = encode_batch(tokenizer, prose()[:16])
    rows = [torch.tensor([[tokenizer.bos_token_id, *one]]) for one in ids]
    wanted, bf16, int8, weights = (
        torch.cat([model(row).logits[0].float() for row in rows]) for model in (theirs, rounded, path, exact)
    )
    assert divergence(wanted, int8) <= INT8_KL_OVER_BF16 * divergence(wanted, bf16)
    assert agreement(wanted, int8) >= agreement(wanted, bf16) - INT8_TOP1_UNDER_BF16
    assert divergence(weights, int8) <= PATH_KL
    assert "Paris" in ask(out)
