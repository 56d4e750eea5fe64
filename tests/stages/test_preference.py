"""`llmctl reward`, `dpo` and `score` on tiny models, against transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llmctl.errors import UserError
from llmctl.evaluate.scores import above
from llmctl.recipe.load import load_recipe
from llmctl.recipe.tune import DpoRecipe
from llmctl.runs import read_manifest
from llmctl.stages import preference
from llmctl.train.checkpoint import checkpoints
from tests.program import Outcome, Program
from tests.stages.bad_input import snapshot

FAST = ["train.threads=1", "train.logging_steps=1", "train.learning_rate=1e-2", "train.dtype=float32"]
KINDS = pytest.mark.parametrize("kind", ["reward", "dpo"])
METHODS = pytest.mark.parametrize("method", ["--lora", "--full"])


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def prefs(stocked: Path) -> Path:
    """`stocked` with `prefs.jsonl`: forty pairs in which `good` is preferred to some kind of `bad`."""
    rows = [{"prompt": str(i), "chosen": "good", "rejected": "bad" + "!" * (i % 3)} for i in range(40)]
    write(stocked / "prefs.jsonl", rows)
    return stocked


def ok(outcome: Outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def trained(llmctl: Program, kind: str, method: str, *words: str, out: str = "run") -> dict:
    """The figures of a run on the pairs."""
    outcome = llmctl(kind, "base", "--data", "prefs.jsonl", "--out", out, method, "--json", *FAST, *words)
    return ok(outcome)["metrics"]


@KINDS
@METHODS
def test_it_learns_and_says_what_that_is_worth(prefs, llmctl, kind, method):
    found = trained(llmctl, kind, method, "train.num_train_epochs=3.0")
    assert found["steps"] == 15 and found["eval_pairs"] == 4
    assert found["eval_accuracy"] == 1.0 and found["eval_accuracy_low"] == pytest.approx(0.5101, abs=1e-4)
    assert 0 <= found["eval_shorter_wins"] <= 1
    names = {path.name for path in (prefs / "run").iterdir()}
    weights = "adapter_model.safetensors" if method == "--lora" else "model.safetensors"
    assert {weights, "tokenizer.json", "chat_template.jinja", "report.html", "recipe.yaml"} <= names
    assert ("generation_config.json" in names) == (kind == "dpo")
    manifest = read_manifest(prefs / "run")
    assert (manifest["stage"], manifest["status"]) == (kind, "done")
    assert manifest["data"]["train"]["rows"] == 36 and manifest["data"]["eval"]["rows"] == 4
    assert manifest["parents"][0]["role"] == "model"
    assert "eval accuracy" in (prefs / "run" / "report.html").read_text().replace("_", " ")


def rows_of(tokenizer, prefs: Path) -> list[tuple[str, list[int]]]:
    """Every answer with its prompt, rendered by transformers; the template ends a turn with a line break."""
    found = []
    for line in (prefs / "prefs.jsonl").read_text().splitlines():
        row = json.loads(line)
        for side in ("chosen", "rejected"):
            talk = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[side]},
            ]
            text = tokenizer.apply_chat_template(talk, tokenize=False)
            found.append((row[side], tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]))
    return found


@METHODS
def test_score_is_what_transformers_gives(prefs, llmctl, method):
    trained(llmctl, "reward", method)
    before = snapshot(prefs)
    found = ok(llmctl("score", "run", "--data", "prefs.jsonl", "--json"))
    assert snapshot(prefs) == before
    tokenizer = AutoTokenizer.from_pretrained(prefs / "run")
    if method == "--full":
        model = AutoModelForSequenceClassification.from_pretrained(prefs / "run").eval()
    else:
        base = AutoModelForSequenceClassification.from_pretrained(prefs / "base", num_labels=1)
        model = PeftModel.from_pretrained(base, prefs / "run").eval()
    with torch.no_grad():
        want = [float(model(input_ids=torch.tensor([ids])).logits) for _, ids in rows_of(tokenizer, prefs)]
    assert sorted(row["score"] for row in found["rows"]) == pytest.approx(sorted(want), abs=1e-5)
    chosen, rejected = torch.tensor(want[::2]), torch.tensor(want[1::2])
    assert found["accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert found["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert found["mean_score"] == pytest.approx(float(torch.tensor(want).mean()), abs=1e-5)
    assert (found["answers"], found["pairs"]) == (80, 40)
    # 14 of the rejected are `bad`, one token shorter than `good` or as long, the others are longer
    assert found["shorter_wins"] == pytest.approx(
        sum(0.5 if a == b else float(a < b) for a, b in _lengths(tokenizer, prefs)) / 40
    )
    scores = [row["score"] for row in found["rows"]]
    assert scores == sorted(scores, reverse=True)
    assert {row["answer"] for row in found["rows"]} == {"good", "bad", "bad!", "bad!!"}
    assert {row["side"] for row in found["rows"] if row["answer"] == "good"} == {"chosen"}


def _lengths(tokenizer, prefs: Path) -> list[tuple[int, int]]:
    lengths = [len(ids) for _, ids in rows_of(tokenizer, prefs)]
    return list(zip(lengths[::2], lengths[1::2], strict=True))


def test_dpo_moves_the_model_towards_the_chosen(prefs, llmctl):
    """By transformers' own model, summed log-probabilities of the answers, before and after."""
    trained(llmctl, "dpo", "--full", "train.num_train_epochs=3.0")

    @torch.no_grad()
    def margin(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        sums = []
        for _, ids in rows_of(AutoTokenizer.from_pretrained(prefs / "run"), prefs):
            logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            sums.append(float(logps[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum()))
        return sum(sums[::2]) - sum(sums[1::2])

    assert margin(prefs / "run") - margin(prefs / "base") > 40 * 1.0


@KINDS
@METHODS
def test_a_run_that_stopped_goes_on(prefs, llmctl, monkeypatch, kind, method):
    whole = trained(llmctl, kind, method, "train.save_steps=2", out="whole")
    real, saves = preference.train_preferences, []

    def cut_short(job, talk):
        def save(folder):
            saves.append(folder)
            if len(saves) == 2:
                raise UserError("the disk is full")
            job_save(folder)

        job_save, job.save = job.save, save
        return real(job, talk)

    monkeypatch.setattr(preference, "train_preferences", cut_short)
    words = [
        kind,
        "base",
        "--data",
        "prefs.jsonl",
        "--out",
        "cut",
        method,
        *FAST,
        "train.save_steps=2",
        "--json",
    ]
    assert llmctl(*words).code == 1
    assert [path.name for path in checkpoints(prefs / "cut")] == ["step-000002"]
    monkeypatch.setattr(preference, "train_preferences", real)
    outcome = llmctl(*words, "--resume")
    assert "resuming from step 2 of 5" in outcome.err
    again = ok(outcome)["metrics"]
    assert read_manifest(prefs / "cut")["hash"] == read_manifest(prefs / "whole")["hash"]
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
    outcome = llmctl(*words, "--resume")
    assert outcome.code == 0 and "this run is done; nothing to resume" in outcome.err


def test_a_reward_model_is_trained_further(prefs, llmctl):
    trained(llmctl, "reward", "--lora")
    first = ok(llmctl("score", "run", "--data", "prefs.jsonl", "--json"))
    ok(llmctl("reward", "run", "--data", "prefs.jsonl", "--out", "more", "--lora", "--json", *FAST))
    second = ok(llmctl("score", "more", "--data", "prefs.jsonl", "--json"))
    assert second["margin"] > first["margin"] + 0.1


def test_score_reads_conversations_and_labels(prefs, llmctl):
    trained(llmctl, "reward", "--lora", "train.num_train_epochs=3.0")
    pair = ok(llmctl("score", "run", "--data", "prefs.jsonl", "--json"))
    known = {(row["place"], row["answer"]): row["score"] for row in pair["rows"]}
    talks = [
        {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": answer}]}
        for answer in ("bad", "good")
    ]
    write(prefs / "talks.jsonl", talks)
    found = ok(llmctl("score", "run", "--data", "talks.jsonl", "--json"))
    assert [(row["place"], row["answer"]) for row in found["rows"]] == [
        ("talks.jsonl:2", "good"),
        ("talks.jsonl:1", "bad"),
    ]
    assert found.keys() == {"answers", "mean_score", "rows"} and "side" not in found["rows"][0]
    # line 4 of the pairs has the same prompt: the same answer has the same score, however it was written down
    for row in found["rows"]:
        assert row["score"] == pytest.approx(known["prefs.jsonl:4", row["answer"]], abs=1e-5)
    labels = [
        {"prompt": str(i), "completion": "good" if i % 2 else "bad", "label": bool(i % 2)} for i in range(6)
    ]
    write(prefs / "labels.jsonl", labels)
    found = ok(llmctl("score", "run", "--data", "labels.jsonl", "--json"))
    assert (found["labelled"], found["auc"]) == (6, 1.0)
    write(prefs / "wrong.jsonl", [row | {"label": not row["label"]} for row in labels])
    assert ok(llmctl("score", "run", "--data", "wrong.jsonl", "--json"))["auc"] == 0.0


def test_score_lists_the_best_first(prefs, llmctl):
    trained(llmctl, "reward", "--lora", "train.num_train_epochs=3.0")
    outcome = llmctl("score", "run", "--data", "prefs.jsonl")
    lines = outcome.out.splitlines()
    assert lines[0].endswith("  good") and "prefs.jsonl:" in lines[0]
    assert any(line.split() == ["accuracy", "1"] for line in lines)


def test_long_answers_are_left_out_and_told(prefs, llmctl):
    trained(llmctl, "reward", "--lora")
    rows = [json.loads(line) for line in (prefs / "prefs.jsonl").read_text().splitlines()]
    write(prefs / "one.jsonl", [*rows, {"prompt": "x", "chosen": "y" * 90, "rejected": "z"}])
    outcome = llmctl("score", "run", "--data", "one.jsonl", "--json")
    assert ok(outcome)["pairs"] == 40 and "longer than 64 tokens (one.jsonl:41)" in outcome.err
    outcome = llmctl("score", "run", "--data", "prefs.jsonl", "score.max_length=10")
    assert outcome.code == 1
    assert (
        "40 of 40 records are longer than 10 tokens, as prefs.jsonl:1: too many to leave out" in outcome.err
    )
    assert "hint: raise score.max_length, or take those records out of the data" in outcome.err


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["reward", "base"], "no data to train on", "name files with --data"),
        (["score", "base"], "no data to score", "name files with --data"),
        (
            ["score", "base", "--data", "prefs.jsonl"],
            "base: holds a language model (LlamaForCausalLM), not a reward model",
            "`llmctl reward` makes a reward model of it",
        ),
        (
            ["dpo", "base", "--data", "data.jsonl"],
            "data.jsonl:1: no pair of answers: the record is `text`",
            "a pair has `chosen` and `rejected`",
        ),
        (["dpo", "base", "--data", "prefs.jsonl", "train.dtype=float16"], "train.dtype: float16", "bfloat16"),
        (
            ["reward", "base", "--data", "prefs.jsonl", "data.overlong=split"],
            "data.overlong: `split` makes no sense for a pair of answers",
            "use drop or truncate",
        ),
        (
            ["dpo", "base", "--data", "prefs.jsonl", "dpo.label_smoothing=0.1"],
            "`label_smoothing` belongs to loss_type `robust`; `sigmoid` would ignore it",
            "",
        ),
    ],
    ids=lambda value: value[0] + value[-1][:12] if isinstance(value, list) else "",
)
def test_what_is_refused_leaves_nothing(prefs, llmctl, words, said, hint):
    before = snapshot(prefs)
    outcome = llmctl(*words)
    assert outcome.code in (1, 2) and said in outcome.err and hint in outcome.err
    assert snapshot(prefs) == before


def test_a_reward_model_is_no_language_model(prefs, llmctl):
    trained(llmctl, "reward", "--lora")
    trained(llmctl, "reward", "--full", out="full")
    for words in (["generate", "run", "x"], ["dpo", "run", "--data", "prefs.jsonl"]):
        assert "run: holds an adapter of a reward model, not of a language model" in llmctl(*words).err
    assert (
        "full: holds a reward model (LlamaForSequenceClassification)" in llmctl("generate", "full", "x").err
    )


def test_rates_follow_the_method():
    for words, rate in (([], 5e-6), (["method=full"], 1e-6), (["train.learning_rate=3e-5"], 3e-5)):
        assert load_recipe(DpoRecipe, None, {}, words).resolved(10**9).train.learning_rate == rate


@pytest.mark.parametrize(
    ("wanted", "unwanted", "auc"),
    [([2.0], [1.0], 1.0), ([1.0], [2.0], 0.0), ([1.0], [1.0], 0.5), ([3.0, 1.0], [2.0, 1.0, 0.0], 4.5 / 6)],
)
def test_above_counts_every_pair(wanted, unwanted, auc):
    assert above(wanted, unwanted) == pytest.approx(auc)
    by_hand = [0.5 if a == b else float(a > b) for a in wanted for b in unwanted]
    assert auc == pytest.approx(sum(by_hand) / len(by_hand))


def test_above_needs_both():
    with pytest.raises(ValueError, match="both kinds"):
        above([1.0], [])


@KINDS
def test_on_a_four_bit_base_what_is_trained_stays_float32(prefs, llmctl, kind):
    """TRL would cast it to bfloat16, in which most small updates are lost."""
    trained(llmctl, kind, "--qlora", "train.max_steps=2")
    weights = load_file(prefs / "run" / "adapter_model.safetensors")
    assert weights and {weight.dtype for weight in weights.values()} == {torch.float32}
    assert read_manifest(prefs / "run")["base_precision"] == "nf4"
