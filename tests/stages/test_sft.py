"""`llmctl sft` from end to end on a tiny model: the run folder, and all that is done with it afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.open import open_model
from llmctl.recipe.model import ModelSection
from llmctl.recipe.rates import chosen_rate, shown
from llmctl.runs import folder_hash, read_manifest
from llmctl.stages.sft import _shown_answer
from tests.program import Outcome, Program
from tests.stages.bad_input import WEIGHTS, Bad, snapshot, told
from tests.stages.conftest import FEW, RECORDS, TUNE, VOCABULARY

CUT = "data.overlong=truncate"  # where a template is longer than the tiny context allows

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
WHOLE = ["--full", "lora.r=16"]  # the default again, because there is no adapter to set anything of
ENDS = [2, 4]  # end of text, and the end of a turn
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
RUN = {"run.json", "recipe.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints"}


def did(outcome: Outcome) -> Outcome:
    """The outcome of a command that must have worked."""
    assert outcome.code == 0, outcome.err
    return outcome


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter."""
    return load_file(folder / ADAPTER_WEIGHTS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the run folder ----------------------------------------------------------------------------------


def test_run_folder(talking: Path, llmctl: Program) -> None:
    before = snapshot(talking / "base")
    outcome = did(llmctl(*TUNE, "--out", "out", "--json"))
    out = talking / "out"
    assert {path.name for path in out.iterdir()} == {*RUN, *TOKENIZER, ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    assert snapshot(talking / "base") == before
    manifest = read_manifest(out)
    assert json.loads(outcome.out) == {"run": "out", "metrics": manifest["metrics"]}
    assert set(manifest["metrics"]) == {
        "loss", "eval_loss", "eval_perplexity", "eval_tokens", "steps", "tokens", "seconds",
        "tokens_per_second", "trained_parameters",
    }  # fmt: skip
    steps = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert steps == ["step-000003", "step-000006"]
    last = out / "checkpoints" / "step-000006"
    assert (last / ADAPTER_WEIGHTS).read_bytes() == (out / ADAPTER_WEIGHTS).read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ENDS
    settings = json.loads((out / ADAPTER_CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str((talking / "base").resolve())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 32, 0)
    assert settings["trainable_token_indices"] == [3, 4]
    assert len(settings["target_modules"]) == 7


def test_manifest(talking: Path, llmctl: Program) -> None:
    did(llmctl(*TUNE, "--out", "out", "data.eval_fraction=0.2"))
    found, base = read_manifest(talking / "out"), read_manifest(talking / "base")
    assert (found["stage"], found["status"], found["seed"], found["error"]) == ("sft", "done", 0, None)
    assert found["parents"] == [{"role": "model", "path": "base", "hash": base["hash"]}]
    assert found["hash"] == folder_hash(talking / "out")
    assert (found["tokenizer"], found["template"]) == (base["tokenizer"], base["template"])
    assert (found["stop_ids"], found["vocab_size"]) == (ENDS, VOCABULARY)
    assert (found["trained_tokens"], found["base_precision"]) == ([3, 4], None)
    train, held = found["data"]["train"], found["data"]["eval"]
    assert train["sources"] == ["talks.jsonl"] and train["formats"] == {"alpaca": RECORDS}
    assert train["account"]["read"] == train["account"]["kept"] == RECORDS
    assert train["rows"] + held["rows"] <= RECORDS and held["rows"] > 1
    assert found["metrics"]["eval_tokens"] == held["trained_tokens"]
    assert found["metrics"]["trained_parameters"] == sum(
        w.numel() for w in adapter_of(talking / "out").values()
    )


def test_words_on_the_way(talking: Path, llmctl: Program) -> None:
    said = did(llmctl(*TUNE, "--out", "out")).err.splitlines()
    assert said[0] == "the base has never seen <|im_start|>, <|im_end|>: their embeddings are trained too"
    assert said[1:3] == [f"formats: {RECORDS} alpaca", f"read {RECORDS} records, kept {RECORDS}"]
    rate = TUNE[[word.startswith("train.learning_rate=") for word in TUNE].index(True)].partition("=")[2]
    assert said[3] == f"learning rate {shown(float(rate))}, as train.learning_rate says"
    trained = read_manifest(talking / "out")["metrics"]["trained_parameters"]
    assert said[4] == f"training {trained:,} parameters (lora) on cpu, float32"
    samples = lines(talking / "out" / "samples.jsonl")
    for line, step in zip(said[5:], (0, 6), strict=True):
        first = next(row for row in samples if row["step"] == step)
        head, _, answer = line.partition(" → ")
        assert head.startswith(f"step {step}: ")
        # the template's marks are left out, the question is not
        assert "<|" not in head and head.split()[-2] in first["prompt"]
        assert answer


@pytest.mark.parametrize(
    ("text", "ids", "room", "words"),
    [
        ("", [2], 9, "(ends at once)"),
        (" \n", [5, 6, 2], 9, "(3 tokens without text)"),
        ("", [], 0, "(no room in the context for an answer)"),
        ("Yes,\nthat is.", [5, 2], 9, "Yes, that is."),
    ],
)
def test_an_answer_without_text_says_why(text: str, ids: list[int], room: int, words: str) -> None:
    assert _shown_answer(text, ids, room) == words


@pytest.mark.parametrize(
    ("stage", "method", "parameters", "rate"),
    [
        ("sft", "lora", 8 * 10**9, 2e-4), ("sft", "full", 10**9, 2e-5), ("sft", "lora", 135 * 10**6, 5e-4),
        ("sft", "full", 135 * 10**6, 5e-5), ("sft", "lora", 30 * 10**6, 1e-3), ("sft", "lora", 10**6, 2e-3),
        ("dpo", "lora", 135 * 10**6, 1.25e-5), ("reward", "full", 10**6, 1e-4),
    ],
)  # fmt: skip
def test_the_rate_is_chosen_by_size_and_method(stage: str, method: str, parameters: int, rate: float) -> None:
    assert chosen_rate(stage, method, parameters) == pytest.approx(rate)
    page = (Path(__file__).parents[2] / "docs" / "sft.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{stage}`, `{method}`"))
    assert f" {shown(rate)} |" in row


def test_the_chosen_rate_is_said_and_written_down(talking: Path, llmctl: Program) -> None:
    words = [word for word in TUNE if not word.startswith("train.learning_rate=")]
    said = did(llmctl(*words, "--out", "out")).err
    (line,) = [line for line in said.splitlines() if line.startswith("learning rate")]
    size = sum(weight.numel() for weight in load_model(talking / "base").parameters())
    assert line == (
        f"learning rate 2e-3: the default of sft by lora for {size:,} parameters; train.learning_rate sets another"
    )
    assert "learning_rate: 0.002" in (talking / "out" / "recipe.yaml").read_text()
    assert did(llmctl("sft", "base", "--resume", "--out", "out")).err.strip().endswith("nothing to resume")


def test_metrics_samples_and_report(adapter: Path) -> None:
    rows = lines(adapter / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(evaluated) == 6
    assert losses[-1] < losses[0] - 0.02 and evaluated[-1] < evaluated[0] - 0.02
    samples = lines(adapter / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 6, 6]
    for row in samples:
        assert row["prompt"].startswith("<|bos|><|im_start|>user\n")
        assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert row["reference"].endswith("<|im_end|>") and isinstance(row["answer"], str)
    page = (adapter / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 2 and "eval_loss" in page
    assert "step 0: " in page and "step 6: " in page


@pytest.mark.slow
def test_it_learns(talking: Path, llmctl: Program) -> None:
    """Whole training on few records: most answers come back to the letter, and end by themselves."""
    words = [*TUNE[:4], "train.num_train_epochs=60", "train.learning_rate=2e-2", "train.threads=1"]
    did(llmctl(*words, "--full", "data.eval_fraction=0", "--out", "out", "train.warmup_ratio=0.1"))
    found = json.loads(did(llmctl("eval", "out", "--answers", "--data", "talks.jsonl", "--json")).out)
    before = json.loads(did(llmctl("eval", "base", "--answers", "--data", "talks.jsonl", "--json")).out)
    assert before["exact_match"] == 0 and found["exact_match"] > 0.5, found
    assert found["loss"] < 0.3 < before["loss"]


# --- what is trained ---------------------------------------------------------------------------------


def test_lora_is_the_default(talking: Path, llmctl: Program) -> None:
    did(llmctl(*TUNE, "--lora", "--out", "out"))
    assert (talking / "out" / ADAPTER_WEIGHTS).read_bytes() == (
        talking / "adapter" / ADAPTER_WEIGHTS
    ).read_bytes()
    words = llmctl(*TUNE, "method=lora", "--out", "again")
    assert words.code == 0
    assert (talking / "again" / ADAPTER_WEIGHTS).read_bytes() == (
        talking / "out" / ADAPTER_WEIGHTS
    ).read_bytes()


def test_qlora(talking: Path, llmctl: Program) -> None:
    """The run evaluates on its four-bit base, and what it leaves opens on the rounded one."""
    outcome = did(llmctl(*TUNE, "--qlora", "--out", "out", "--eval-data", "talks.jsonl"))
    assert "parameters (qlora) on cpu" in outcome.err
    found = read_manifest(talking / "out")
    assert found["base_precision"] == "nf4"
    assert adapter_of(talking / "out").keys() == adapter_of(talking / "adapter").keys()
    scored = json.loads(did(llmctl("eval", "out", "--answers", "--data", "talks.jsonl", "--json")).out)
    assert scored["loss"] == pytest.approx(found["metrics"]["eval_loss"], rel=1e-5)
    (talking / "out" / "run.json").write_text(json.dumps(found | {"base_precision": None}))
    whole = json.loads(did(llmctl("eval", "out", "--answers", "--data", "talks.jsonl", "--json")).out)
    assert whole["loss"] != pytest.approx(scored["loss"], rel=1e-5)


def test_full(talking: Path, llmctl: Program) -> None:
    """A whole model that transformers opens, every weight of which has moved."""
    did(llmctl(*TUNE, *WHOLE, "--out", "out"))
    out = talking / "out"
    assert {path.name for path in out.iterdir()} == {*RUN, *TOKENIZER, "config.json", WEIGHTS}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llama", ENDS)
    before, after = load_file(talking / "base" / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    manifest = read_manifest(out)
    assert manifest["metrics"]["trained_parameters"] == sum(weight.numel() for weight in after.values())
    x = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(x).logits
        torch.testing.assert_close(load_model(out)(x).logits, theirs, atol=1e-5, rtol=1e-4)


def foreign(folder: Path, base: Path, tied: bool) -> None:
    """A model no run of ours made, whose tokenizer has neither the turn tokens nor a template."""
    about = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied}
    spec = ModelSection(**{name: about[name] for name in SIZES}, tie_word_embeddings=tied)
    save_model(
        new_model(spec.model_copy(update={"vocab_size": 298}), 0, bos_token_id=1, eos_token_id=2), folder
    )
    backend = json.loads((base / "tokenizer.json").read_text())
    gone = [token["id"] for token in backend["added_tokens"] if token["content"].startswith("<|im_")]
    assert gone == [3, 4]
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] not in gone]
    kept = sorted((i, word) for word, i in backend["model"]["vocab"].items() if i not in gone)
    backend["model"]["vocab"] = {word: number for number, (_, word) in enumerate(kept)}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", ["--lora", "--full"])
def test_new_tokens_make_room(method: str, tied: bool, talking: Path, llmctl: Program) -> None:
    """The template needs tokens the vocabulary lacks: they get rows, which are trained, saved and opened."""
    foreign(talking / "hf", talking / "base", tied)
    words = ["sft", "hf", *TUNE[2:], *([method] if method == "--lora" else WHOLE)]
    words += ["--eval-data", "talks.jsonl", "--out", "out"]
    outcome = did(llmctl(*words, "--template", "chatml"))
    assert "the base has never seen <|im_start|>, <|im_end|>: their embeddings" in outcome.err
    found = read_manifest(talking / "out")
    assert (found["trained_tokens"], found["vocab_size"], found["stop_ids"]) == ([298, 299], 300, [2, 299])
    scored = json.loads(did(llmctl("eval", "out", "--answers", "--data", "talks.jsonl", "--json")).out)
    assert scored["loss"] == pytest.approx(found["metrics"]["eval_loss"], rel=1e-5)
    opened = open_model("out")
    assert opened.config.vocab_size == 300 and opened.generation_config.eos_token_id == [2, 299]
    row = opened.model.embed_tokens.weight[298]
    assert not torch.allclose(row, load_model("hf").model.embed_tokens.weight.mean(0), atol=1e-3)
    if method == "--lora":
        theirs = AutoModelForCausalLM.from_pretrained("hf")
        theirs.resize_token_embeddings(300, mean_resizing=False)
        x = torch.tensor([[1, 298, 20, 299, 40]])
        with torch.no_grad():
            expected = PeftModel.from_pretrained(theirs, "out").eval()(x).logits
            torch.testing.assert_close(opened(x).logits, expected, atol=1e-5, rtol=1e-4)
        did(llmctl("merge", "out", "--out", "merged", "compare.min_effect=0"))
        assert load_model("merged").config.vocab_size == 300


def test_transformers_and_peft_open_the_run(talking: Path, llmctl: Program) -> None:
    """Base, adapter and tokenizer by their own loaders, and the answer of transformers' own decoding."""
    base = json.loads((talking / "adapter" / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), talking / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(talking / "adapter")
    prompt = [{"role": "user", "content": "What does Noah play?"}]
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ours = open_model(talking / "adapter")(ids["input_ids"]).logits
        torch.testing.assert_close(ours, theirs(**ids).logits, atol=1e-5, rtol=1e-4)
        said = theirs.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=ENDS, pad_token_id=0)
    words = ["--chat", "--temperature", "0", "--max-new-tokens", "12", "--json"]
    found = json.loads(did(llmctl("generate", "adapter", "What does Noah play?", *words)).out)
    assert found["tokens"] == said[0, ids["input_ids"].shape[1] :].tolist()


# --- what is done with it ----------------------------------------------------------------------------


def test_generation_ends_with_the_turn(talking: Path, llmctl: Program) -> None:
    """The end of a turn is made the likeliest token of all: generation stops at it."""
    path = talking / "adapter" / ADAPTER_WEIGHTS
    found = adapter_of(talking / "adapter")
    name = next(name for name in found if "trainable_tokens_delta" in name)
    hidden = open_model(talking / "adapter")
    # the row of <|im_end|> points where the hidden states do
    x = torch.tensor([[1, 3, 50, 4]])
    with torch.no_grad():
        state = hidden.model(x).last_hidden_state[0, -1]
    found[name][1] = state * 10
    save_file(found, path, metadata={"format": "pt"})
    words = ["--chat", "--temperature", "0", "--max-new-tokens", "40", "--json"]
    tokens = json.loads(did(llmctl("generate", "adapter", "Hi", *words)).out)["tokens"]
    assert tokens[-1] == 4 and len(tokens) < 40


def test_eval_answers_agrees_with_the_run(talking: Path, llmctl: Program) -> None:
    did(llmctl(*TUNE, "--out", "out", "--eval-data", "talks.jsonl"))
    found = json.loads(did(llmctl("eval", "out", "--answers", "--data", "talks.jsonl", "--json")).out)
    metrics = read_manifest(talking / "out")["metrics"]
    for name in ("loss", "perplexity", "tokens"):
        assert found[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5), name
    assert found["records"] == RECORDS == len(found["matches"])
    assert found["exact_match"] == sum(found["matches"]) / RECORDS
    assert 0 <= found["exact_match_low"] <= found["exact_match"] <= found["exact_match_high"] < 0.15
    base = json.loads(did(llmctl("eval", "base", "--answers", "--data", "talks.jsonl", "--json")).out)
    assert base["loss"] > found["loss"] + 0.02


def test_tuning_again(talking: Path, llmctl: Program) -> None:
    """On the adapter run: its adapter is folded into the base of the next, which trains no token again."""
    before = json.loads(did(llmctl("eval", "adapter", "--answers", "--data", "talks.jsonl", "--json")).out)
    words = ["--data", "talks.jsonl", "--eval-data", "talks.jsonl", *FEW, "train.learning_rate=1e-6"]
    outcome = did(llmctl("sft", "adapter", *words, "--out", "two"))
    assert "the base has never seen" not in outcome.err
    found, adapter = read_manifest(talking / "two"), read_manifest(talking / "adapter")
    assert found["parents"] == [{"role": "model", "path": "adapter", "hash": adapter["hash"]}]
    assert found["trained_tokens"] == [] and found["template"] == adapter["template"]
    assert found["metrics"]["eval_loss"] == pytest.approx(before["loss"], abs=1e-3)
    after = json.loads(did(llmctl("eval", "two", "--answers", "--data", "talks.jsonl", "--json")).out)
    assert after["loss"] == pytest.approx(found["metrics"]["eval_loss"], rel=1e-5)
    assert did(llmctl("generate", "two", "Hi", "--chat", "--max-new-tokens", "3")).out
    whole = did(llmctl("sft", "two", *words, *WHOLE, "--out", "three"))
    assert "(full)" in whole.err and not (talking / "three" / ADAPTER_WEIGHTS).exists()
    metrics = read_manifest(talking / "three")["metrics"]
    assert metrics["eval_loss"] == pytest.approx(before["loss"], abs=1e-3)


def test_pretraining_goes_on_from_it(talking: Path, llmctl: Program) -> None:
    """As from any model: the adapter is folded in, and all weights are trained."""
    before = json.loads(did(llmctl("eval", "adapter", "--data", "data.jsonl", "--json")).out)
    words = ["pretrain", "adapter", "--data", "data.jsonl", "--out", "on", "--dtype", "float32"]
    words += ["--eval-data", "data.jsonl", "train.max_steps=1", "train.learning_rate=1e-9", "train.threads=1"]
    did(llmctl(*words))
    assert read_manifest(talking / "on")["metrics"]["eval_loss"] == pytest.approx(before["loss"], rel=1e-4)
    assert (talking / "on" / WEIGHTS).is_file() and not (talking / "on" / ADAPTER_CONFIG).exists()


def test_the_recipe_repeats_the_run(talking: Path, llmctl: Program) -> None:
    did(llmctl(*TUNE, "--out", "out", "lora.dropout=0.1"))
    did(llmctl("sft", "--recipe", "out/recipe.yaml", "--out", "again"))
    out, again = talking / "out", talking / "again"
    assert (again / ADAPTER_WEIGHTS).read_bytes() == (out / ADAPTER_WEIGHTS).read_bytes()
    assert (again / "recipe.yaml").read_text() == (out / "recipe.yaml").read_text()
    assert read_manifest(again)["hash"] == read_manifest(out)["hash"]
    assert (again / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()


def test_resume_of_a_finished_run(talking: Path, llmctl: Program) -> None:
    before = snapshot(talking)
    outcome = did(llmctl("sft", "--out", "adapter", "--resume", "--json"))
    assert outcome.err == "adapter: this run is done; nothing to resume\n" and snapshot(talking) == before
    other = llmctl("sft", "--out", "adapter", "--resume", "lora.r=5")
    message = "adapter: lora.r was 4 when the run began, and is 5 now"
    told(other, Bad("", message, "resume with the same recipe, or start a new run with another --out"))


def test_tokens_no_stage_has_seen_are_trained_when_a_later_one_writes_them(talking, llmctl):
    """The first run writes no turn tokens, so they are as new to the second as to the base."""
    first = llmctl(
        "sft", "base", "--data", "talks.jsonl", "--template", "alpaca", "--out", "first", *FEW, CUT
    )
    assert first.code == 0 and "never seen" not in first.err, first.err
    second = llmctl(
        "sft", "first", "--data", "talks.jsonl", "--template", "chatml", "--out", "second", *FEW, CUT
    )
    assert second.code == 0, second.err
    assert "the base has never seen <|im_start|>, <|im_end|>" in second.err
    assert "first is an adapter: it is folded into its base" in second.err
    third = llmctl("sft", "second", "--data", "talks.jsonl", "--out", "third", *FEW, CUT)
    assert third.code == 0 and "never seen" not in third.err, third.err
