"""Scores against transformers' own model and loss, document by document."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmctl.data.batches import Laid, eval_batches
from llmctl.data.packing import cut, pack
from llmctl.evaluate.perplexity import Score, score
from llmctl.kernels.device import Compute
from llmctl.model.checkpoint import new_model, save_model
from llmctl.recipe.model import ModelSection

FLOAT = Compute(torch.device("cpu"), torch.float32)
EOS = 2


# what stands between the head's matrix and the logits counts too
HEADS = {"plain": {}, "scaled": {"logits_scaling": 0.25}, "capped": {"final_logit_softcapping": 0.05}}


@pytest.mark.parametrize("head", HEADS)
def test_packed_scores_equal_transformers_one_document_at_a_time(head, tmp_path):
    model = new_model(
        ModelSection(
            vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **HEADS[head]
        ),
        0,
    ).eval()
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    random = np.random.default_rng(0)
    # ids 0 to 2 among them: an end token is one by its place
    documents = [np.concatenate([random.integers(0, 31, n), [EOS]]) for n in (5, 19, 2, 30, 11)]
    documents[1][3:6] = EOS
    starts = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    ids = np.concatenate(documents).astype(np.uint16)
    pieces = cut(starts, 40, "split")
    laid = Laid(ids, pieces, pack(pieces.length, 40), ended=np.ones(len(pieces), dtype=bool))
    found = score(model, eval_batches(laid, batch_size=2, pad_id=0), text_bytes=100.0, compute=FLOAT)

    nats, text_nats, tokens = 0.0, 0.0, 0
    for document in documents:
        x = torch.tensor(document)[None]
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(theirs(x).logits[0, :-1], x[0, 1:], reduction="none")
        nats, text_nats, tokens = (
            nats + float(each.sum()),
            text_nats + float(each[:-1].sum()),
            tokens + len(each),
        )
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-5) and found.text_nats == pytest.approx(
        text_nats, rel=1e-5
    )
    figures = found.figures()
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(text_nats / math.log(2) / 100, rel=1e-5)


def test_extreme_scores_have_figures():
    assert Score(1e6, 1e6, 1, 10).figures()["perplexity"] == math.inf
    assert math.isnan(Score(0.0, 0.0, 0, 0).figures()["bits_per_byte"])
