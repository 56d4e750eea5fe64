"""A run in plain words: whatever a manifest holds, and every stage and state."""

from __future__ import annotations

from typing import Any

import pytest

from llmctl.summary import RESULTS, TRAINING, Summary, summarize

SFT: dict[str, Any] = {
    "stage": "sft",
    "status": "done",
    "finished": "2026-05-01T12:30:59+0200",
    "command": "sft runs/base --data 'my answers.json'",
    "device": "cpu, bfloat16",
    "seed": 3,
    "base_precision": "nf4",
    "parents": [{"role": "model", "path": "runs/base", "hash": "ab"}],
    "outputs": {"adapter_model.safetensors": "cd"},
    "data": {
        "train": {
            "sources": ["my answers.json"],
            "tokens": 5000,
            "trained_tokens": 2000,
            "account": {"noun": "record", "read": 100, "kept": 97},
        },
        "eval": {
            "sources": ["my answers.json"],
            "rows": 4,
            "tokens": 90,
            "account": {"read": 100, "kept": 97},
        },
    },
    "metrics": {
        "loss": 1.5,
        "eval_loss": 1.75,
        "steps": 30,
        "tokens": 900,
        "seconds": 75.0,
        "tokens_per_second": 12.0,
    },
}
ROWS = [
    {"step": 10, "loss": 4.0},
    {"step": 15, "eval_loss": 3.0},
    {"step": 30, "loss": 1.5},
    {"step": 30, "eval_loss": 1.75},
]


def said(summary: Summary) -> str:
    parts = [
        f"[{heading}] " + "; ".join(f"{k}: {v}" for k, v in lines) for heading, lines in summary.sections()
    ]
    return "\n".join([summary.title, *parts, "; ".join(command for command, _ in summary.following)])


def test_a_training() -> None:
    assert said(summarize("runs/my run", SFT, ROWS, 3 << 20)) == (
        "my run (sft)\n"
        "[what it is] folder: runs/my run; result: model trained to answer, from conversations (SFT); adapter (LoRA, on a"
        " base of four bits); status: done, 2026-05-01 12:30 +0200; device: cpu, bfloat16; on disk: 3.0 MiB; command:"
        " llmctl sft runs/base --data 'my answers.json'\n"
        "[made from] base model: runs/base; trained on: my answers.json: 97 records, 3 of 100 dropped, 5,000 tokens,"
        " 2,000 of them in answers; held out: 4 rows of the same data, 90 tokens; seed: 3\n"
        "[how it went] steps: 30; loss: 4 → 1.5 (nats per token, in training); held-out loss: 3 → 1.75 (nats per"
        " token); training time: 1:15, 900 tokens trained, 12 tokens/s\n"
        "llmctl chat 'runs/my run'; llmctl merge 'runs/my run'; llmctl compare runs/base 'runs/my run' --data"
        " 'my answers.json'"
    )


@pytest.mark.parametrize("stage", RESULTS)
def test_every_stage_says_what_is_next(stage: str) -> None:
    summary = summarize("r", SFT | {"stage": stage, "outputs": {}}, [])
    assert summary.following and all(
        command.startswith("llmctl ") and " r" in command for command, _ in summary.following
    )


@pytest.mark.parametrize("status", ["failed", "interrupted", "crashed"])
@pytest.mark.parametrize("stage", RESULTS)
def test_what_did_not_end_says_how_to_go_on(stage: str, status: str) -> None:
    ((command, _),) = summarize(
        "r", {"stage": stage, "status": status, "command": f"{stage} x"}, []
    ).following
    assert command == (f"llmctl {stage} --out r --resume" if stage in TRAINING else f"llmctl {stage} x")


def test_failures_are_told() -> None:
    failed = summarize("r", {"stage": "sft", "status": "failed", "error": "the disk is full"}, ROWS)
    assert failed.went[:2] == [("error", "the disk is full"), ("steps", "30")]
    refused = {"stage": "merge", "status": "refused", "refused": ["too far"], "command": "merge x --out r"}
    summary = summarize("r", refused, [])
    assert summary.went == [("refused", "too far")]
    assert summary.following[0][0] == "llmctl merge x --out r --accept"
    assert summarize("r", {"stage": "sft", "status": "running"}, []).following[0][0] == "llmctl runs watch r"


def test_a_quantization_is_before_and_after() -> None:
    metrics = {
        "size_bytes_before": 4 << 20,
        "size_bytes": 1 << 20,
        "perplexity_before": 2.0,
        "perplexity": 2.5,
        "stop_rate_a": 1.0,
        "stop_rate_b": 0.5,
        "method": "gptq",
        "bits": 4,
        "top1": 0.975,
        "kept": [f"l{i}" for i in range(8)],
        "noise_kl": 1e-5,
    }
    lines = dict(summarize("r", {"stage": "quantize", "status": "done", "metrics": metrics}, []).went)
    assert lines == {
        "method": "gptq, 4 bits",
        "weights": "4.0 MiB → 1.0 MiB",
        "perplexity": "2 → 2.5",
        "answers that end": "100% → 50%",
        "in full": "l0, l1, l2, l3, l4, l5 and 2 more",
        "same next token": "97.50%",
    }


def test_preferences_stand_beside_what_length_alone_gives() -> None:
    metrics = {
        "eval_accuracy": 0.75,
        "eval_accuracy_low": 0.7,
        "eval_accuracy_high": 0.8,
        "eval_pairs": 80,
        "eval_shorter_wins": 0.5,
    }
    lines = dict(summarize("r", {"stage": "dpo", "status": "done", "metrics": metrics}, []).went)
    assert lines["preferred"] == "the chosen answer in 75.0% of 80 held-out pairs (95 %: 70.0% to 80.0%)"
    assert lines["by length alone"] == "50.0%, by taking the shorter answer"


WRONG = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [[]],
    {},
    {"a": {"b": []}},
    [None, 3, {"role": []}],
]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_damaged_manifests_are_told_of_all_the_same(value: Any) -> None:
    """Every field, and every field within, in every wrong type: a page comes out, and no error."""
    cases = [SFT | {key: value} for key in SFT]
    cases += [SFT | {"data": SFT["data"] | {use: value}} for use in ("train", "eval", "sources")]
    cases += [SFT | {"data": {"train": SFT["data"]["train"] | {key: value}}} for key in SFT["data"]["train"]]
    cases += [
        SFT | {"metrics": SFT["metrics"] | {key: value}}
        for key in (*SFT["metrics"], "kept", "method", "eval_pairs")
    ]
    cases += [
        SFT | {"status": "refused", "refused": value},
        SFT | {"accepted": value, "needs_merging": value},
    ]
    for manifest in cases:
        said(summarize("r", manifest, ROWS))
        said(summarize("r", manifest | {"status": "failed"}, [{"step": value, "loss": value}, *ROWS]))
