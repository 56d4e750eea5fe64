"""Options and fields under the names of other tools are answered with ours."""

from __future__ import annotations

import pytest

from llmctl.recipe.load import dotted_fields
from llmctl.recipe.other_names import FIXED, NAMES, meant_by
from llmctl.recipe.schema import RECIPES
from tests.program import Program

FIELDS = {stage: dotted_fields(kind) for stage, kind in RECIPES.items()}


def test_every_name_leads_to_a_field():
    known = {field for fields in FIELDS.values() for field in fields}
    for fields in (*NAMES, *(entry[0] for entry in FIXED.values())):
        assert set(fields) <= known
    names = [name for line in NAMES.values() for name in line.split()]
    assert len(names) == len(set(names))
    assert not set(names) & FIXED.keys()


@pytest.mark.parametrize("stage", FIELDS)
def test_a_field_is_no_other_name_of_another(stage):
    for field in FIELDS[stage]:
        meant = meant_by(field.rpartition(".")[2], FIELDS[stage])
        assert (
            meant is None
            or meant.field.rpartition(".")[2] == field.rpartition(".")[2]
            or meant.field == field
        )


# options of transformers' and TRL's command lines, Axolotl's and LLaMA-Factory's files -> what is written here
OPTIONS = {
    "sft m --lr 1e-4": "write train.learning_rate=1e-4",
    "sft m --learning-rate=3e-4": "write train.learning_rate=3e-4",
    "sft m --learning_rate": "write train.learning_rate=VALUE",
    "sft m --epochs 3": "write train.num_train_epochs=3",
    "sft m --num_train_epochs 3": "write train.num_train_epochs=3",
    "sft m --batch-size 4": "write train.per_device_train_batch_size=4",
    "sft m --micro_batch_size 4": "write train.per_device_train_batch_size=4",
    "dpo m --gradient-accumulation-steps 4": "write train.gradient_accumulation_steps=4",
    "sft m --max_seq_length 512": "write data.max_length=512",
    "sft m --lora_alpha 16": "write lora.alpha=16",
    "sft m --lora_r 8": "write lora.r=8",
    "sft m --lr_scheduler_type linear": "write train.lr_scheduler_type=linear",
    "sft m --warmup_steps 10": "write train.warmup_ratio=0.03 (a share of the steps)",
    "sft m --output_dir o": "write --out o",
    "sft m --bf16": "write --dtype bfloat16",
    "sft m --load_in_4bit": "write method=qlora",
    "sft --model_name_or_path m": "the model is the first word: llmctl sft MODEL",
    "pretrain --n-layer 6": "write model.num_hidden_layers=6",
    "eval m --batch-size 3": "write eval.batch_size=3",
    "generate m p --max-tokens 5": "write --max-new-tokens 5",
    "data inspect f --max-seq-length 5": "write data.max_length=5",
    "tokenizer train --lr 3": "see `llmctl tokenizer train --help`",
}


@pytest.mark.parametrize("line", OPTIONS)
def test_options(line: str, llmctl_: Program) -> None:
    ended = llmctl_(*line.split())
    option = next(word for word in line.split() if word.startswith("--")).partition("=")[0]
    assert ended.code == 2
    assert ended.err == f"error: no such option: {option}\nhint: {OPTIONS[line]}\n"


WORDS = {
    "sft m lr=1e-4": ("lr", "train.learning_rate"),
    "sft m epochs=3": ("epochs", "train.num_train_epochs"),
    "sft m train.batch_size=3": ("train.batch_size", "train.per_device_train_batch_size"),
    "sft m learning_rate=3": ("learning_rate", "train.learning_rate"),
    "dpo m max_seq_length=3": ("max_seq_length", "data.max_length"),
    "eval m batch_size=3": ("batch_size", "eval.batch_size"),
    "pretrain model.n_embd=3": ("model.n_embd", "model.hidden_size"),
}


@pytest.mark.parametrize("line", WORDS)
def test_words(line: str, llmctl_: Program) -> None:
    ended = llmctl_(*line.split())
    given, field = WORDS[line]
    assert ended.code == 1
    assert ended.err == f"error: command line: {given}: unknown key\nhint: did you mean `{field}`?\n"
