"""`llmctl compare`: its figures, its bounds, and that each of its fields does something."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.recipe.tune import CompareSection, MergeSection
from llmctl.stages.gate import faithful_kl, out_of_bounds, similar_kl
from tests.program import Program
from tests.stages.bad_input import snapshot
from tests.stages.conftest import RECORDS

# the figures of a `compare base adapter` are printed even where they are out of bounds
WORDS = ["compare", "base", "adapter", "--data", "talks.jsonl", "--json", "compare.max_new_tokens=4"]


def compared(llmctl: Program, *words: str) -> dict[str, Any]:
    outcome = llmctl(*WORDS, *words)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@torch.no_grad()
def test_figures_by_hand(talking: Path, llmctl: Program) -> None:
    """Transformers' own models and template, one record at a time."""
    before = snapshot(talking)
    found = compared(llmctl, "compare.answers=3")
    assert snapshot(talking) == before
    tokenizer = AutoTokenizer.from_pretrained("base")
    one = AutoModelForCausalLM.from_pretrained("base")
    two = AutoModelForCausalLM.from_pretrained("base")
    two.load_adapter("adapter")
    kl, agreed, nats, count = 0.0, 0, [0.0, 0.0], 0
    prompts = []
    for line in (talking / "talks.jsonl").read_text().splitlines():
        record = json.loads(line)
        asked = "\n\n".join(filter(None, (record["instruction"], record["input"])))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        prompts.append(prompt)
        whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        logs = [model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in (one, two)]
        kl += float(F.kl_div(logs[1], logs[0], reduction="sum", log_target=True))
        agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        nats = [
            sum_ + float(F.nll_loss(log, ids[0, start:], reduction="sum"))
            for sum_, log in zip(nats, logs, strict=True)
        ]
        count += ids.shape[1] - start
    assert (found["tokens"], found["rows"]) == (count, RECORDS)
    assert found["kl"] == pytest.approx(kl / count, rel=1e-3)
    assert found["top1"] == pytest.approx(agreed / count)
    for side, total in zip("ab", nats, strict=True):
        assert found[f"perplexity_{side}"] == pytest.approx(
            torch.tensor(total / count).exp().item(), rel=1e-4
        )
    assert [answer["prompt"] for answer in found["answers"]] == prompts[:3]
    assert all(
        set(answer) == {"prompt", "reference", "a", "b", "stopped_a", "stopped_b"}
        for answer in found["answers"]
    )
    assert all(answer["reference"].endswith("<|im_end|>") for answer in found["answers"])


def test_a_model_is_itself(talking: Path, llmctl: Program) -> None:
    words = ["compare", "adapter", "adapter", "--data", "talks.jsonl", "--json", "compare.answers=2"]
    outcome = llmctl(*words, "compare.max_kl=0", "compare.min_top1=1")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["top1"], found["kl"], found["same_answers"], found["failed"]) == (1, 0, 1, [])


def test_a_bound(talking: Path, llmctl: Program) -> None:
    outcome = llmctl(*WORDS, "--max-kl", "1e-5")
    assert outcome.code == 3
    said = r"divergence \S+ is above 1e-05 nats per token"
    assert re.search(f"^error: adapter is not what base is: {said}$", outcome.err, re.MULTILINE), outcome.err
    failed = json.loads(outcome.out)["failed"]
    assert len(failed) == 1 and re.fullmatch(said, failed[0])


def test_what_is_out_of_bounds() -> None:
    limits = (0.9, 0.2)
    assert out_of_bounds({"top1": 0.9, "kl": 0.2}, *limits) == []
    low, far = "top-1 agreement 0.8900 is below 0.9", "divergence 0.25 is above 0.2 nats per token"
    assert out_of_bounds({"top1": 0.89, "kl": 0.25}, *limits) == [low, far]
    lost = ["divergence not a number is above 0.2 nats per token"]
    assert out_of_bounds({"top1": 1.0, "kl": math.nan}, *limits) == lost
    noisy = {"top1": 0.5, "decided_top1": 0.89, "kl": 0.1}
    assert out_of_bounds(noisy, *limits) == [
        "top-1 agreement where rounding decides nothing 0.8900 is below 0.9"
    ]


def test_what_noise_allows() -> None:
    assert (faithful_kl({}), similar_kl({})) == (1e-4, 0.01)
    assert faithful_kl({"noise_kl": 0.02}) == pytest.approx(0.0401)
    assert similar_kl({"noise_kl": 0.02}) == 0.04


def test_the_listing_and_exit_code(talking: Path, llmctl: Program) -> None:
    outcome = llmctl(*WORDS[:5], "--max-kl", "1e-6", "compare.answers=1", "compare.max_new_tokens=3")
    assert outcome.code == 3 and "failed" not in outcome.out
    assert [line.split()[0] for line in outcome.out.splitlines()[:10]] == [
        "top1", "kl", "kl_error", "max_kl", "perplexity_a", "perplexity_b", "tokens", "rows",
        "stop_rate_a", "stop_rate_b",
    ]  # fmt: skip


def test_other_templates_are_told(talking: Path, llmctl: Program) -> None:
    """A model with another template: both read the rows through that of the first."""
    (talking / "base" / "run.json").unlink()  # it would refuse the change
    (talking / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    words = ["compare", "adapter", "base", *WORDS[3:]]
    assert (
        "the chat templates differ: both models read the rows through that of adapter\n" in llmctl(*words).err
    )


def test_without_a_template(talking: Path, llmctl: Program) -> None:
    for name in ("one", "two"):
        shutil.copytree(talking / "base", talking / name)
        for gone in ("run.json", "chat_template.jinja"):
            (talking / name / gone).unlink()
    outcome = llmctl("compare", "one", "two", "--data", "talks.jsonl", "--json", "compare.answers=0")
    assert outcome.code == 0, outcome.err
    assert "the model has no chat template: using `alpaca`" in outcome.err


# --- the fields ---------------------------------------------------------------------------------------

Figures = dict[str, Any]
LOOK: dict[str, Callable[[Figures, Figures], bool]] = {
    "compare.data=[data.jsonl]": lambda new, old: new["tokens"] > 2000 and new["answers"] == [],
    "compare.data=[body.jsonl] compare.text_field=body": lambda new, old: new["tokens"] < old["tokens"],
    "compare.max_rows=3": lambda new, old: new["rows"] == 3 and new["tokens"] < old["tokens"] / 4,
    "compare.max_tokens=5": lambda new, old: new["rows"] == 1 and new["tokens"] < old["tokens"] / 4,
    "compare.max_length=50": lambda new, old: new["tokens"] < old["tokens"] and new["rows"] <= RECORDS,
    "compare.answers=0": lambda new, old: new["answers"] == [] and new["same_answers"] is None,
    "compare.max_new_tokens=2": lambda new, old: len(new["answers"][0]["a"]) < len(old["answers"][0]["a"]),
    "compare.dtype=bfloat16": lambda new, old: new["kl"] != old["kl"] and new["kl"] > 0,
    "compare.min_top1=1": lambda new, old: new == old,
    "compare.max_kl=1": lambda new, old: new == old | {"allowed_kl": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("words", LOOK)
def test_fields(words: str, talking: Path, llmctl: Program) -> None:
    texts = [json.loads(line)["text"] for line in (talking / "data.jsonl").read_text().splitlines()[:3]]
    (talking / "body.jsonl").write_text("".join(json.dumps({"body": text[:90]}) + "\n" for text in texts))
    old = compared(llmctl, "compare.answers=1")
    new = compared(llmctl, "compare.answers=1", *words.split())
    assert LOOK[words](new, old), (new, old)


def test_every_field_has_a_test() -> None:
    """`batch_size` is only about memory; others are looked at in test_merge.py, test_threads.py and test_document_limit.py."""
    named = {word.partition("=")[0].removeprefix("compare.") for line in LOOK for word in line.split()}
    assert named | {"batch_size", "threads", "max_document_mb"} == set(CompareSection.model_fields)
    assert named | {"batch_size", "threads", "max_document_mb", "min_effect"} == set(
        MergeSection.model_fields
    )


def test_batch_size_changes_nothing(talking: Path, llmctl: Program) -> None:
    one, two = (compared(llmctl, f"compare.batch_size={size}", "compare.answers=0") for size in (1, 7))
    assert one["tokens"] == two["tokens"] and one["kl"] == pytest.approx(two["kl"], rel=1e-3)
