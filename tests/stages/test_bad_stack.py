"""Models that are no decoder, given to commands that write or score text: one clear error each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from tests.program import Program
from tests.stages.bad_input import NEW, Bad, Make, cases, check
from tests.stages.conftest import VOCABULARY


def stored(name: str, model: torch.nn.Module) -> Make:
    """A maker of a model folder with the tokenizer of `base`."""

    def make(here: Path) -> None:
        model.save_pretrained(here / name)
        for path in (here / "base").glob("tokenizer*"):
            shutil.copy(path, here / name)
        (here / "pairs.jsonl").write_text(PAIRS)

    return make


PAIRS = "".join(f'{{"prompt": "Who is {n}?", "chosen": "Anna.", "rejected": "Ben."}}\n' for n in range(4))
BERT = BertConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
T5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
MASKED = (
    "bert: holds a masked language model (BertForMaskedLM), not a language model",
    "an encoder reads both ways and writes nothing; give a language model here",
    stored("bert", BertForMaskedLM(BERT)),
)
PAIR = (
    "t5: holds an encoder–decoder (T5ForConditionalGeneration), not a language model",
    "in Python, LlmctlForConditionalGeneration opens it; give a language model here",
    stored("t5", T5ForConditionalGeneration(T5)),
)
COMMANDS = {
    "generate": "generate {} Anna",
    "chat": "chat {}",
    "eval": "eval {} --data data.jsonl",
    "sft": "sft {} --data talks.jsonl --out out",
    "pretrain": "pretrain {} --data data.jsonl --out out",
    "quantize": "quantize {} --eval-data data.jsonl --out out",
    "reward": "reward {} --data pairs.jsonl --out out",
}
OTHERS = {
    **{f"{name} bert": Bad(words.format("bert"), *MASKED) for name, words in COMMANDS.items()},
    **{f"{name} t5": Bad(words.format("t5"), *PAIR) for name, words in COMMANDS.items()},
    "generate from a backbone": Bad(
        "generate bert Anna",
        "bert: holds a backbone without a head (BertModel), not a language model",
        "give the whole model it was taken from",
        stored("bert", BertModel(BERT)),
    ),
    "compare": Bad("compare base bert --data data.jsonl", *MASKED),
    "a new encoder": Bad(
        f"{NEW} model.stack=encoder",
        "model.stack: `encoder`, but `llmctl pretrain` teaches models to write",
        "set model.stack to decoder",
    ),
}


@cases(OTHERS)
def test_no_decoder(bad: Bad, talking: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    check(bad, talking, llmctl)
