"""What can be wrong with `merge`, `compare` and `eval --answers`, through the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmctl.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TASKS
from llmctl.runs import read_manifest
from tests.program import Program
from tests.stages.bad_input import Bad, Make, cases, check, file

NAME_IT = "name a folder with a model, or a hub id"
MODEL = "name a run folder, a Hugging Face folder or a hub id"
FORMATS = "name files with --data; formats: `alpaca`, `messages` …"
SWAPPED = "copy it back from the run's parent, or from the folder's last checkpoint"


def config(folder: str, name: str, **values: object) -> Make:
    """A maker of other entries in a JSON file."""

    def make(here: Path) -> None:
        path = here / folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


def both(*makers: Make) -> Make:
    return lambda here: [make(here) for make in makers]


def another_vocabulary(here: Path) -> None:
    """`other`: the base with two entries of its vocabulary exchanged, and no run that would know."""
    shutil.copytree(here / "base", here / "other", ignore=shutil.ignore_patterns("checkpoints", "run.json"))
    path = here / "other" / "tokenizer.json"
    value = json.loads(path.read_text())
    entries = value["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    path.write_text(json.dumps(value))


def foreign(here: Path) -> None:
    """`adapter` as another program would have left it, on `base`."""
    (here / "adapter" / "run.json").unlink()
    config("adapter", ADAPTER_CONFIG, base_model_name_or_path="base")(here)


def without_data(here: Path) -> None:
    about = read_manifest(here / "adapter")
    about["data"]["train"]["sources"] = about["data"]["eval"]["sources"] = ["gone.jsonl"]
    (here / "adapter" / "run.json").write_text(json.dumps(about))


QUANTIZED = config("base", "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

MERGE = {
    "no RUN": Bad("merge --out out", "missing argument MODEL", MODEL, code=2),
    "not there": Bad("merge no/such/run --out out", "no/such/run: no such folder", NAME_IT),
    "a whole model": Bad(
        "merge base --out out",
        "base: not an adapter, so there is nothing to merge",
        "name the folder of an `sft --lora` run",
    ),
    "two runs": Bad(
        "merge adapter base --out out",
        "unexpected argument: base",
        "one MODEL at most; repeat --data for each file, or quote a pattern: --data '*.txt'",
        code=2,
    ),
    "out is occupied": Bad(
        "merge adapter --out base", "base: the folder is not empty", "choose another --out"
    ),
    "out is the adapter": Bad(
        "merge adapter --out adapter", "adapter: the folder is not empty", "choose another --out"
    ),
    "data not there": Bad(
        "merge adapter --out out --data talk.jsonl",
        "talk.jsonl: no such file or folder",
        "did you mean `talks.jsonl`?",
    ),
    "data of the run gone": Bad(
        "merge adapter --out out",
        "gone.jsonl: no such file or folder",
        "did you mean `data.jsonl`?",
        without_data,
    ),
    "no data known": Bad(
        "merge adapter --out out",
        "adapter: says nothing of the data it was trained on",
        "name some with --data FILE",
        foreign,
    ),
    "a quantized base": Bad(
        "merge adapter --out out --data talks.jsonl",
        "base/config.json: quantization_config: the weights are quantized (gptq), and of quantized ones only compressed-tensors pack-quantized is read",
        "use the model they were made from, and `llmctl quantize` it",
        both(foreign, QUANTIZED),
    ),
    "an adapter of a reward model": Bad(
        "merge adapter --out out",
        "adapter: an adapter of a reward model, which is not merged",
        "`llmctl score` reads it as it is",
        config("adapter", ADAPTER_CONFIG, task_type=TASKS["reward"]),
    ),
    "another kind of adapter": Bad(
        "merge adapter --out out",
        "adapter: adapter of kind IA3 is not supported",
        "LoRA adapters are",
        config("adapter", ADAPTER_CONFIG, peft_type="IA3"),
    ),
    "weights cut short": Bad(
        "merge adapter --out out",
        f"adapter/{ADAPTER_WEIGHTS}: damaged or cut short (Error while deserializing header: header too small)",
        "copy the adapter again",
        file(f"adapter/{ADAPTER_WEIGHTS}", b"abc"),
    ),
    "another template": Bad(
        "merge adapter --out out",
        "adapter: the chat template is not the one this run was made with",
        SWAPPED,
        file("adapter/chat_template.jinja", "{{ messages }}"),
    ),
    "float16 on a CPU": Bad(
        "merge adapter --out out --device cpu compare.dtype=float16",
        "compare.dtype: float16 is far slower than float32 on a CPU",
        "use bfloat16, float32 or auto",
    ),
    "no such precision": Bad(
        "merge adapter --out out --dtype int8",
        "command line: dtype: `int8` is not one of `auto`, `float32`, `bfloat16`, `float16`",
        "`llmctl recipe show merge` explains dtype",
    ),
    "nothing to resume": Bad(
        "merge adapter --out out --resume", "no such option: --resume", "did you mean `--recipe`?", code=2
    ),
}

COMPARE = {
    "one model": Bad(
        "compare base --data talks.jsonl",
        "missing argument B",
        f"two models are compared: {MODEL}",
        code=2,
    ),
    "no models": Bad(
        "compare --data talks.jsonl",
        "missing arguments A and B",
        f"two models are compared: {MODEL}",
        code=2,
    ),
    "three models": Bad(
        "compare base adapter tok --data talks.jsonl",
        "unexpected argument: tok",
        "two models are compared: A and B",
        code=2,
    ),
    "not there": Bad("compare base no/such/b --data talks.jsonl", "no/such/b: no such folder", NAME_IT),
    "no model": Bad(
        "compare base tok --data talks.jsonl",
        "tok: is a tokenizer, not a model",
        "`llmctl pretrain --tokenizer tok` makes a model for it",
    ),
    "no data": Bad("compare base adapter", "no data to compare on", FORMATS),
    "data not there": Bad(
        "compare base adapter --data talk.jsonl",
        "talk.jsonl: no such file or folder",
        "did you mean `talks.jsonl`?",
    ),
    "nothing in the data": Bad(
        "compare base adapter --data x.jsonl",
        "x.jsonl: no usable record (dropped 1: the answer is empty)",
        "mend the file, or leave it out",
        file("x.jsonl", '{"instruction": "a", "output": ""}\n'),
    ),
    "different tokenizers": Bad(
        "compare base other --data talks.jsonl",
        "base and other have different tokenizers, so their tokens cannot be compared",
        "`llmctl eval` measures each in bits per byte, which compares",
        another_vocabulary,
    ),
    "a share above one": Bad(
        "compare base adapter --data talks.jsonl --min-top1 1.5",
        "command line: compare.min_top1: should be less than or equal to 1, not 1.5",
        "`llmctl recipe show compare` explains compare.min_top1",
    ),
    "rows longer than the context": Bad(
        "compare base adapter --data talks.jsonl compare.max_length=65",
        "compare.max_length is 65, but the model's max_position_embeddings is 64",
        "lower compare.max_length, or give the model a longer context",
    ),
    "quantized": Bad(
        "compare adapter base --data talks.jsonl",
        "base/config.json: quantization_config: the weights are quantized (gptq), and of quantized ones only compressed-tensors pack-quantized is read",
        "use the model they were made from, and `llmctl quantize` it",
        QUANTIZED,
    ),
}

EVAL = {
    "no data": Bad("eval base --answers", "no data to score", "name files with --data FILE"),
    "misspelt key": Bad(
        "eval base --answers --data x.jsonl",
        "x.jsonl:1: fits no format: keys `instrution`, `output`; nearest is alpaca",
        "did you mean `instruction`?",
        file("x.jsonl", '{"instrution": "a", "output": "b"}\n'),
    ),
    "all answers empty": Bad(
        "eval base --answers --data x.jsonl",
        "x.jsonl: no usable record (dropped 1: the answer is null)",
        "mend the file, or leave it out",
        file("x.jsonl", '{"instruction": "a", "output": null}\n'),
    ),
    "arrays for records": Bad(
        "eval base --answers --data x.jsonl",
        "x.jsonl:1: the line holds a list, not an object",
        'a jsonl file holds one object a line, as {"text": "…"}',
        file("x.jsonl", '["a", "b"]\n'),
    ),
    "preferences": Bad(
        "eval adapter --answers --data x.jsonl",
        "x.jsonl:1: a record of preferences (`preference`), not of one answer",
        "use it with `llmctl reward` or `llmctl dpo`",
        file("x.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'),
    ),
    "prompts that fill the context": Bad(
        "eval base --answers --data x.jsonl",
        "no record is left to train on (read 1 record, kept 0; "
        "dropped 1: nothing of an answer is within 64 tokens (x.jsonl:1))",
        "raise eval.max_length (up to the context of the model), or give other data",
        file("x.jsonl", json.dumps({"instruction": "word " * 90, "output": "a"}) + "\n"),
    ),
    "no model": Bad("eval --answers --data talks.jsonl", "missing argument MODEL", MODEL, code=2),
}


@cases(MERGE)
def test_merge(bad: Bad, talking: Path, llmctl: Program) -> None:
    check(bad, talking, llmctl)


@cases(COMPARE)
def test_compare(bad: Bad, talking: Path, llmctl: Program) -> None:
    check(bad, talking, llmctl)


@cases(EVAL)
def test_eval_answers(bad: Bad, talking: Path, llmctl: Program) -> None:
    check(bad, talking, llmctl)


@pytest.mark.parametrize(
    "words", ["merge adapter --out locked/out", "sft base --data talks.jsonl --out data.jsonl/x"]
)
def test_out_in_an_impossible_place(words: str, talking: Path, llmctl: Program) -> None:
    (talking / "locked").write_text("a file")
    name = words.split("--out ")[1].split("/")[0]
    place = words.split("--out ")[1]
    check(
        Bad(words, f"{name}: is a file, so {place} cannot be made", "choose another --out"), talking, llmctl
    )
