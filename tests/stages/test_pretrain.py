"""`llmctl pretrain` from end to end on a tiny model: the run folder, its repetition, resume and dry run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.lock import Lock
from llmctl.model.checkpoint import load_model
from llmctl.runs import folder_hash, read_manifest
from tests.program import Program
from tests.stages.bad_input import WEIGHTS, Bad, snapshot, told
from tests.stages.conftest import DOCUMENTS, SMALL, TRAIN, VOCABULARY

NEW = [*TRAIN, "--out", "out"]


def weights(folder: Path) -> bytes:
    """The bytes of a model's weights."""
    return (folder / WEIGHTS).read_bytes()


def rows_of(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def crash(run: Path, checkpoints: bool = True) -> None:
    """Make a finished run look as if its process had been killed before it put the model in place."""
    for name in (WEIGHTS, "config.json", "generation_config.json", "report.html", "tokenizer.json"):
        (run / name).unlink()
    if not checkpoints:
        shutil.rmtree(run / "checkpoints")
    manifest = read_manifest(run)
    for name in ("finished", "outputs", "hash", "metrics", "error"):
        del manifest[name]
    (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}))


@pytest.fixture
def trained(stocked: Path, llmctl: Program) -> Path:
    """A finished run `out`, made by the command line in the folder the test is in."""
    assert llmctl(*NEW).code == 0
    return stocked / "out"


# --- the run folder ----------------------------------------------------------------------------------


def test_run_folder(trained: Path, stocked: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "run.json", "recipe.yaml", "metrics.jsonl", "report.html", "checkpoints",
        "config.json", "generation_config.json", WEIGHTS,
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == [
        "step-000011",
        "step-000012",
    ]
    config = json.loads((trained / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["hidden_size"], config["vocab_size"]) == (16, VOCABULARY)
    assert weights(trained) == weights(trained / "checkpoints" / "step-000012")
    assert (trained / "tokenizer.json").read_bytes() == (stocked / "tok" / "tokenizer.json").read_bytes()


def test_manifest(trained: Path, stocked: Path) -> None:
    found = read_manifest(trained)
    assert (found["stage"], found["status"], found["seed"], found["error"]) == ("pretrain", "done", 0, None)
    assert found["parents"] == [{"role": "tokenizer", "path": "tok", "hash": folder_hash(stocked / "tok")}]
    assert found["parents"][0]["hash"] == read_manifest(stocked / "tok")["hash"]
    assert found["hash"] == folder_hash(trained)
    assert found["tokenizer"] == read_manifest(stocked / "tok")["tokenizer"]
    assert found["template"] == read_manifest(stocked / "tok")["template"]
    train, held = found["data"]["train"], found["data"]["eval"]
    assert train["sources"] == ["data.jsonl"] and train["documents"] == DOCUMENTS
    assert train["fingerprint"] == held["fingerprint"] and len(train["fingerprint"]) == 32
    assert train["account"]["read"] == train["account"]["kept"] == DOCUMENTS
    lines = (stocked / "data.jsonl").read_text().splitlines()
    size = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert train["bytes"] + held["bytes"] == pytest.approx(size, abs=1)
    assert set(found["metrics"]) == {
        "loss", "eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_tokens", "eval_bytes",
        "steps", "tokens", "seconds", "tokens_per_second",
    }  # fmt: skip
    assert found["metrics"]["steps"] == 12
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])


def test_metrics_have_a_line_a_step(trained: Path) -> None:
    rows = rows_of(trained)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluated = [row["eval_bits_per_byte"] for row in rows if "eval_loss" in row]
    assert len(evaluated) == 12 and evaluated[-1] < evaluated[0]
    metrics = read_manifest(trained)["metrics"]
    assert metrics["tokens"] == steps[-1]["tokens"]
    assert metrics["loss"] == steps[-1]["loss"] and metrics["eval_bits_per_byte"] == evaluated[-1]


def test_json_tells_the_run_and_its_metrics(stocked: Path, llmctl: Program) -> None:
    outcome = llmctl(*NEW, "--json")
    assert json.loads(outcome.out) == {"run": "out", "metrics": read_manifest(stocked / "out")["metrics"]}


def test_the_recipe_repeats_the_run(trained: Path, stocked: Path, llmctl: Program) -> None:
    assert llmctl("pretrain", "--recipe", "out/recipe.yaml", "--out", "again").code == 0
    assert weights(stocked / "again") == weights(trained)
    assert (stocked / "again" / "recipe.yaml").read_text() == (trained / "recipe.yaml").read_text()
    assert read_manifest(stocked / "again")["hash"] == read_manifest(trained)["hash"]


def test_another_seed_gives_another_model(trained: Path, stocked: Path, llmctl: Program) -> None:
    assert llmctl("pretrain", "--recipe", "out/recipe.yaml", "--out", "again", "--seed", "1").code == 0
    assert weights(stocked / "again") != weights(trained)


@torch.no_grad()
def test_transformers_opens_the_run(base: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(base)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = load_model(base)(ids).logits
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    text = "Ämne 日本 <|eos|>\n"
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_token_id, 4]


def test_going_on_from_a_model(stocked: Path, llmctl: Program) -> None:
    before = snapshot(stocked / "base")
    words = ["pretrain", "base", "--data", "data.jsonl", "--out", "on", "--max-steps", "3", "train.threads=1"]
    assert llmctl(*words).code == 0
    manifest = read_manifest(stocked / "on")
    theirs = read_manifest(stocked / "base")
    assert manifest["parents"] == [{"role": "model", "path": "base", "hash": theirs["hash"]}]
    assert manifest["tokenizer"] == theirs["tokenizer"]
    first = next(row["eval_loss"] for row in rows_of(stocked / "on") if "eval_loss" in row)
    assert first < rows_of(stocked / "base")[1]["eval_loss"]  # it began where the other ended
    assert weights(stocked / "on") != weights(stocked / "base")
    assert snapshot(stocked / "base") == before
    # the same tokenizer under another name is the same tokenizer
    assert llmctl(*words[:4], "--tokenizer", "tok", "--out", "on2", *words[6:]).code == 0
    assert weights(stocked / "on2") == weights(stocked / "on")


# --- resume ------------------------------------------------------------------------------------------


def test_resume_of_a_finished_run(trained: Path, llmctl: Program) -> None:
    before = snapshot(trained)
    outcome = llmctl("pretrain", "--out", "out", "--resume", "--json")
    assert outcome.code == 0 and outcome.err == "out: this run is done; nothing to resume\n"
    assert json.loads(outcome.out)["metrics"]["steps"] == 12
    assert snapshot(trained) == before


def test_resume_without_a_checkpoint(trained: Path, llmctl: Program) -> None:
    expected = weights(trained)
    crash(trained, checkpoints=False)
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    assert outcome.code == 0
    assert "out: no checkpoint to resume from; starting afresh\n" in outcome.err
    assert weights(trained) == expected
    assert [row["step"] for row in rows_of(trained) if "loss" in row] == list(range(1, 13))


def test_resume_of_nothing_begins(stocked: Path, llmctl: Program) -> None:
    outcome = llmctl(*NEW, "--resume")
    assert outcome.code == 0
    assert "out: no checkpoint to resume from; starting afresh\n" in outcome.err
    assert weights(stocked / "out") == weights(stocked / "base")


def test_resume_after_the_last_step(trained: Path, llmctl: Program) -> None:
    """A process that was killed between its last checkpoint and the end: nothing is trained, all is told."""
    expected, metrics = weights(trained), read_manifest(trained)["metrics"]
    crash(trained)
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    assert outcome.code == 0 and "resuming from step 12 of 12\n" in outcome.err
    assert weights(trained) == expected
    found = read_manifest(trained)
    assert found["status"] == "done" and len(found["resumed"]) == 1
    assert found["metrics"] == metrics


def test_a_disk_that_is_full_for_the_metrics(trained: Path, llmctl: Program) -> None:
    crash(trained)
    shutil.rmtree(trained / "checkpoints" / "step-000012")
    (trained / "metrics.jsonl").unlink()
    (trained / "metrics.jsonl").symlink_to("/dev/full")
    hint = "free some space and run the same command again; a run that had begun goes on with --resume"
    told(llmctl("pretrain", "--out", "out", "--resume"), Bad("", "out/metrics.jsonl: the disk is full", hint))
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-000011"]
    assert read_manifest(trained)["status"] == "failed"


def test_resume_from_the_middle(trained: Path, llmctl: Program) -> None:
    expected = weights(trained)
    crash(trained)
    shutil.rmtree(trained / "checkpoints" / "step-000012")
    outcome = llmctl("pretrain", "--out", "out", "--resume", "train.logging_steps=5", "train.save_steps=3")
    assert outcome.code == 0 and "resuming from step 11 of 12\n" in outcome.err
    assert weights(trained) == expected


WITH = (
    "resume with the same recipe, add --resume-with to go on with the new values, "
    "or start a new run with another --out"
)
DIFFERENT = "resume with the same recipe, or start a new run with another --out"
PUT_BACK = "put it back, or start a new run with another --out"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            "train.learning_rate=5e-3",
            "out: train.learning_rate was 0.01 when the run began, and is 0.005 now",
        ),
        ("--seed 3", "out: train.seed was 0 when the run began, and is 3 now"),
        ("model.hidden_size=32", "out: model.hidden_size was 16 when the run began, and is 32 now"),
        ("train.max_steps=13", "out: train.max_steps was 12 when the run began, and is 13 now"),
    ],
)
def test_resume_with_another_recipe(words: str, error: str, trained: Path, llmctl: Program) -> None:
    crash(trained)
    before = snapshot(trained)
    outcome = llmctl("pretrain", "--out", "out", "--resume", *words.split())
    told(outcome, Bad(words, error, DIFFERENT if words.startswith("model.") else WITH))
    assert snapshot(trained) == before


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("data.jsonl", "out: the train data is not what it was when the run began"),
    ],
)
def test_resume_with_other_inputs(
    name: str, error: str, stocked: Path, trained: Path, llmctl: Program
) -> None:
    crash(trained)
    before = snapshot(trained)
    path = stocked / name
    path.write_text(path.read_text().replace("{", "{ ", 1))
    outcome = llmctl("pretrain", "--out", "out", "--resume")
    told(outcome, Bad(name, error, PUT_BACK))
    assert snapshot(trained) == before


def test_resume_of_a_run_that_is_alive(trained: Path, llmctl: Program) -> None:
    crash(trained)
    lock = Lock(trained)
    lock.acquire()
    before = snapshot(trained)
    pid = json.loads((trained / "run.lock").read_text())["pid"]
    told(
        llmctl("pretrain", "--out", "out", "--resume"),
        Bad(
            "",
            f"out: the run is in use by process {pid}",
            "wait for it, or stop it, then run the same command again",
        ),
    )
    assert snapshot(trained) == before
    lock.release()
    assert llmctl("pretrain", "--out", "out", "--resume").code == 0


# --- the dry run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "train.num_train_epochs=0.2",
        "train.num_train_epochs=0.1 train.gradient_accumulation_steps=3",
        "data.eval_fraction=0.3 train.num_train_epochs=0.1",
        "data.eval_fraction=0 train.max_steps=2",
        "data.packing=false data.max_length=32 train.max_steps=2",
        "data.overlong=truncate train.num_train_epochs=0.1",
        "--eval-data valid.jsonl train.num_train_epochs=0.1",
    ],
)
def test_a_dry_run_tells_what_the_run_does(words: str, stocked: Path, home: Path, llmctl: Program) -> None:
    (stocked / "valid.jsonl").write_text('{"text": "Anna lives here."}\n{"text": "So does Ben."}\n')
    common = ["pretrain", "--tokenizer", "tok", "--data", "data.jsonl", "--out", "out", *SMALL]
    common += [*words.split(), "train.threads=1", "train.per_device_train_batch_size=4"]
    before = snapshot(stocked)
    planned = llmctl(*common, "--dry-run", "--json")
    assert planned.code == 0
    assert snapshot(stocked) == before and snapshot(home) == {}
    plan = json.loads(planned.out)
    assert llmctl(*common).code == 0
    manifest, model = read_manifest(stocked / "out"), load_model(stocked / "out")
    data = manifest["data"]["train"]
    assert plan["estimated"] is False
    assert (plan["documents"], plan["rows"], plan["tokens"]) == (DOCUMENTS, data["rows"], data["tokens"])
    assert plan["steps"] == manifest["metrics"]["steps"]
    assert plan["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert plan["device"] == manifest["device"]
    assert manifest["metrics"]["tokens"] <= plan["tokens_in_run"]


def test_a_dry_run_meets_bad_data(stocked: Path, llmctl: Program) -> None:
    (stocked / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    outcome = llmctl(*NEW[:-4], "--data", "x.jsonl", "--dry-run")
    assert outcome.code == 1
    assert outcome.err.startswith("error: x.jsonl:2: invalid JSON (expecting value, column 10)\nhint: ")
