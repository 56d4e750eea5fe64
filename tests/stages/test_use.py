"""`llmctl eval` and `generate` on tiny models, against transformers and sums made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.runs import read_manifest
from tests.program import Program
from tests.stages.bad_input import snapshot
from tests.stages.conftest import SMALL

CONTEXT = 64
GREEDY = ["--temperature", "0", "--ignore-eos", "--json"]

# --- eval --------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(folder: Path, texts: list[str]) -> dict[str, float]:
    """The figures of `eval`, from transformers' own model and one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, text_nats, tokens = 0.0, 0.0, 0
    for text in texts:
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
        # a long document goes on in the next row with the last token of the row before
        for start in range(0, len(ids) - 1, CONTEXT - 1):
            row = torch.tensor([ids[start : start + CONTEXT]])
            found = model(row).logits[0, :-1].double().log_softmax(-1)
            each = -found.gather(1, row[0, 1:, None]).squeeze(1)
            nats += float(each.sum())
            text_nats += float(each[row[0, 1:] != tokenizer.eos_token_id].sum())
            tokens += len(each)
    size = sum(len(text.encode()) for text in texts)
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": text_nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


@pytest.mark.parametrize("words", [[], ["eval.batch_size=1"]])
def test_eval_is_what_a_sum_by_hand_gives(words: list[str], stocked: Path, llmctl: Program) -> None:
    """Two documents, one of them longer than a row and not in English."""
    texts = ["Anna lives in a town.", "Ämne på 日本語. " * 12]
    (stocked / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    before = snapshot(stocked)
    outcome = llmctl("eval", "base", "--data", "two.jsonl", "--json", *words)
    assert outcome.code == 0 and snapshot(stocked) == before
    found, expected = json.loads(outcome.out), by_hand(stocked / "base", texts)
    assert list(found) == ["loss", "perplexity", "bits_per_byte", "tokens", "bytes"]
    assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])
    assert expected["tokens"] > 2 * CONTEXT
    assert found == pytest.approx(expected, rel=1e-5)


def test_eval_agrees_with_the_run(stocked: Path, llmctl: Program) -> None:
    """The figures a run reports for `data.eval` are those of `eval` on that file."""
    (stocked / "valid.jsonl").write_text((stocked / "data.jsonl").read_text()[:1000].rsplit("\n", 1)[0])
    words = ["--eval-data", "valid.jsonl", "--max-steps", "3", "--dtype", "float32", "train.threads=1"]
    train = ["pretrain", "--tokenizer", "tok", "--data", "data.jsonl", "--out", "out", *SMALL, *words]
    assert llmctl(*train).code == 0
    found = json.loads(llmctl("eval", "out", "--data", "valid.jsonl", "--json").out)
    metrics = read_manifest(stocked / "out")["metrics"]
    for name, value in found.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


# --- generate ----------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """New ids from transformers' own greedy decoding, which stops at nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    every = torch.tensor([ids])
    for _ in range(count):
        every = torch.cat([every, model(every).logits[:, -1:].argmax(-1)], dim=1)
    return every[0, len(ids) :].tolist()


def test_greedy_text_is_that_of_transformers(stocked: Path, llmctl: Program) -> None:
    outcome = llmctl("generate", "base", "Anna", "--max-new-tokens", "30", *GREEDY)
    found = json.loads(outcome.out)
    assert list(found) == ["text", "tokens", "tokens_per_second"] and found["tokens_per_second"] > 0
    tokenizer = AutoTokenizer.from_pretrained(stocked / "base")
    ids = tokenizer("Anna")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert found["tokens"] == greedy(stocked / "base", ids, 30)
    assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)


def test_chat_renders_the_template(stocked: Path, llmctl: Program) -> None:
    outcome = llmctl("generate", "base", "Hi", "--chat", "--max-new-tokens", "8", *GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(stocked / "base")
    rendered = "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert json.loads(outcome.out)["tokens"] == greedy(stocked / "base", ids, 8)


def test_text_goes_to_stdout_and_talk_to_stderr(stocked: Path, llmctl: Program) -> None:
    text = json.loads(llmctl("generate", "base", "Anna", "--max-new-tokens", "9", *GREEDY).out)["text"]
    outcome = llmctl("generate", "base", "Anna", "--max-new-tokens", "9", *GREEDY[:-1])
    assert outcome.out == text + "\n"
    assert outcome.err.startswith("9 tokens, ") and outcome.err.endswith(" tokens/s\n")


def test_the_seed_decides(stocked: Path, llmctl: Program) -> None:
    def tokens(*words: str) -> list[int]:
        every = ["--max-new-tokens", "20", "--ignore-eos", "--json", "--temperature", "1"]
        return json.loads(llmctl("generate", "base", "Anna", *every, *words).out)["tokens"]

    assert tokens("--seed", "7") == tokens("--seed", "7")
    assert tokens("--seed", "7") != tokens("--seed", "8")
    assert tokens("--top-k", "1") == tokens("--temperature", "0") == tokens("--top-p", "1e-6")


@pytest.mark.parametrize(("ignore", "count"), [(False, 1), (True, 12)])
def test_an_end_token_ends_unless_it_is_ignored(
    ignore: bool, count: int, stocked: Path, llmctl: Program
) -> None:
    """The likeliest token is declared an end token, as a model's generation config may do."""
    first = json.loads(llmctl("generate", "base", "Anna", "--max-new-tokens", "1", *GREEDY).out)["tokens"]
    path = stocked / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": first}))
    words = ["--temperature", "0", "--max-new-tokens", "12", "--json", *["--ignore-eos"] * ignore]
    found = json.loads(llmctl("generate", "base", "Anna", *words).out)
    assert len(found["tokens"]) == count and found["tokens"][:1] == first


def test_the_context_ends_a_text(stocked: Path, llmctl: Program) -> None:
    outcome = llmctl("generate", "base", "!?" * 25, "--max-new-tokens", "500", *GREEDY)
    assert outcome.code == 0 and outcome.err == "the context ends after 13 new tokens\n"
    assert len(json.loads(outcome.out)["tokens"]) == 13  # BOS and 50 more came before
