"""Loss and gradients of an adapter on masked rows: the same however the rows are packed, padded and accumulated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from llmctl.data.batches import IGNORE, Batch, Batches, Laid, collate
from llmctl.data.packing import cut, pack, unpacked
from llmctl.model.adapters import add_lora
from llmctl.model.checkpoint import new_model
from llmctl.recipe.experts import SparseExperts
from llmctl.recipe.mixers import RoutingSection
from llmctl.recipe.model import ModelSection
from llmctl.train.losses import causal_lm, trained_tokens

SPEC = ModelSection(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
LENGTH = 24
ROWS = 12
Found = tuple[float, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """LoRA on every layer and two trained rows of the embedding; nothing of it is zero."""
    made = add_lora(
        new_model(SPEC, seed=0), r=4, alpha=8, dropout=0.0, target_modules="all-linear", tokens=[3, 4]
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return made


def data(packing: bool) -> Laid:
    """Conversations of one to three turns: some tokens of each are answers."""
    random = np.random.default_rng(0)
    lengths = random.integers(4, LENGTH + 1, ROWS)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(0, 31, starts[-1]).astype(np.uint32)
    trained = np.zeros(len(ids), dtype=bool)
    for start, length in zip(starts[:-1], lengths, strict=True):
        trained[start + length // 3 : start + length // 2 + 1] = True
        trained[start + length - random.integers(1, 3) : start + length] = True
    pieces = cut(starts, LENGTH, "error")
    rows = pack(pieces.length, LENGTH) if packing else unpacked(len(pieces))
    return Laid(ids, pieces, rows, trained)


def gradients(model: torch.nn.Module, micro: list[Batch]) -> Found:
    """Loss of a step and its gradients, as the loop takes them."""
    model.zero_grad(set_to_none=True)
    tokens, total = trained_tokens(micro), 0.0
    for batch in micro:
        loss = causal_lm(model, batch, tokens)
        loss.backward()
        total += float(loss.detach())
    return total, {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}


def step(laid: Laid, batch_size: int, accumulation: int, pad_id: int = 0) -> list[Batch]:
    return Batches(
        laid, max_length=LENGTH, batch_size=batch_size, accumulation=accumulation, seed=0, pad_id=pad_id
    ).step(0)


def same(one: Found, other: Found) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, other[1][name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_changes_nothing(model, packing):
    """1x8 and 8x1; rows have unequally many labels, so a mean of means is another number."""
    laid = data(packing)
    size = min(8, len(laid.rows))
    one, eight = step(laid, size, 1), step(laid, 1, size)
    assert (len(one), len(eight)) == (1, size)
    same(gradients(model, one), gradients(model, eight))
    means = [float(causal_lm(model, batch, trained_tokens([batch])).detach()) for batch in eight]
    assert abs(np.mean(means) - gradients(model, one)[0]) > 1e-4


def test_packing_changes_nothing(model):
    packed, alone = data(True), data(False)
    assert len(packed.rows) < len(alone.rows) == ROWS
    same(gradients(model, step(packed, len(packed.rows), 1)), gradients(model, step(alone, ROWS, 1)))


@pytest.mark.parametrize("pad", [0, 7, 30])
def test_padding_changes_nothing(model, pad):
    """Whatever it is, an id that answers end with included."""
    laid = data(False)
    padded = step(laid, ROWS, 1, pad)
    assert (padded[0]["input_ids"] == pad).sum() > ROWS
    same(gradients(model, padded), gradients(model, step(laid, 1, ROWS)))


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_routed_to_no_expert(packing):
    """Nor does it move centroids."""
    spec = SPEC.model_copy(
        update={
            "pattern": ["routing", "full"],
            "routing": RoutingSection(num_clusters=3),
            "experts": SparseExperts(kind="sparse", num_experts=4, correction_bias=True),
        }
    )
    model, (batch,) = new_model(spec, seed=0).train(), step(data(packing), ROWS, 1)
    tokens = int(data(packing).pieces.length.sum())
    assert batch["input_ids"].numel() > tokens
    causal_lm(model, batch, 1).backward()
    for layer in model.model.layers:
        assert int(layer.mlp.gate.counts.sum()) == 2 * tokens
    gathered = model.model.layers[0].self_attn.gathered
    assert int(gathered[..., -1].sum()) == 2 * tokens


def test_a_document_has_the_loss_it_has_alone(model):
    laid = data(True)
    alone = []
    for number in range(ROWS):
        batch = collate(data(False), [number], pad_id=0)
        alone.append(float(causal_lm(model, batch, 1).detach()))
    found = np.zeros(ROWS)
    with torch.no_grad():
        for row in range(len(laid.rows)):
            batch = collate(laid, [row], pad_id=0)
            whole = causal_lm(model, batch, 1)
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
            nats = torch.nn.functional.cross_entropy(
                logits[:-1].float(), batch["labels"][0, 1:], reduction="none", ignore_index=IGNORE
            )
            assert float(nats.sum()) == pytest.approx(float(whole), rel=1e-5)
            at = 0
            for piece in laid.rows[row]:
                end = at + int(laid.pieces.length[piece])
                found[piece] = nats[at : end - 1].sum()
                at = end
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_what_is_masked_is_only_context(model):
    """Labels that are left out add nothing: loss by hand from the logits of one row."""
    batch = collate(data(False), [1], pad_id=0)
    labels = batch["labels"][0]
    with torch.no_grad():
        logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0].double()
        wanted = [
            -torch.log_softmax(logits[at - 1], -1)[labels[at]]
            for at in range(1, len(labels))
            if labels[at] >= 0
        ]
        assert 0 < len(wanted) < len(labels) - 1
        found = causal_lm(model, batch, trained_tokens([batch]))
    assert float(found) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)


def test_an_adapter_and_the_same_weights_folded_in_have_one_loss(model):
    batch = collate(data(True), [0, 1], pad_id=0)
    with torch.no_grad():
        with_adapter = float(causal_lm(model, batch, 10))
        with model.disable_adapter():
            without = float(causal_lm(model, batch, 10))
        folded = copy.deepcopy(model).merge_and_unload()
        assert float(causal_lm(folded, batch, 10)) == pytest.approx(with_adapter, rel=1e-5)
    assert abs(with_adapter - without) > 1e-3
