"""A real encoder of sentences, all-MiniLM-L6-v2, through the core's BERT row. The oracle is transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llmctl.model import LlmctlModel
from llmctl.model.checkpoint import load_model
from llmctl.model.embedding import embed

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

SENTENCES = [
    "A man is playing the guitar on a stage.",
    "Someone makes music in front of an audience.",
    "The stock market fell sharply on Monday.",
    "Share prices dropped at the beginning of the week.",
    "She boils two eggs for breakfast.",
    "Eggs are cooked in the morning.",
]
NEAREST = [1, 0, 3, 2, 5, 4]
BOUND = 1e-4  # hidden states reach 10


@pytest.fixture(scope="module")
def ours(minilm: Path) -> Any:
    return load_model(minilm, torch.float32, kind=LlmctlModel).eval()


@pytest.fixture(scope="module")
def batch(minilm: Path) -> Any:
    return AutoTokenizer.from_pretrained(minilm)(SENTENCES, padding=True, return_tensors="pt")


@torch.no_grad()
def test_hidden_states_equal_transformers(minilm: Path, ours: Any, batch: Any) -> None:
    theirs = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    real = batch["attention_mask"].bool()
    assert not real.all()
    found, expected = (model(**batch).last_hidden_state[real] for model in (ours, theirs))
    assert float((found - expected).abs().max()) <= BOUND


@torch.no_grad()
def test_the_nearest_sentence_means_the_same(ours: Any, batch: Any) -> None:
    found = embed(ours, batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], normalize=True)
    likeness = (found @ found.T).fill_diagonal_(-1)
    best, second = likeness.topk(2).values.unbind(-1)
    assert likeness.argmax(-1).tolist() == NEAREST
    assert float((best - second).min()) > 0.3  # of cosines
