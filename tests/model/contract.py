"""What every decoder promises, one function each; they raise AssertionError where a promise is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import load_model, save_model
from llmctl.plan.size import PARTS, kv_cache_bytes, parameters, total_parameters
from tests.model.variants import LENGTH, SIZES, ids

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def shape_and_gradients(model: LlmctlForCausalLM) -> None:
    """Logits [B, T, V], and a gradient for every weight that is finite and not nothing."""
    model.zero_grad()
    out = model(ids(), labels=ids())
    assert out.logits.shape == (2, LENGTH, SIZES["vocab_size"])
    out.loss.backward()
    for name, weight in model.named_parameters():
        if name.endswith("gate.noise.weight") or (weight.grad is None and ".experts." in name):
            continue  # read in training alone; an expert that no token came to
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name


@torch.no_grad()
def no_future_leak(model: LlmctlForCausalLM) -> None:
    """Later tokens change later logits only."""
    x, cut = ids(), 11
    changed = x.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % SIZES["vocab_size"]
    one, other = model(x).logits, model(changed).logits
    torch.testing.assert_close(one[:, :cut], other[:, :cut], **CLOSE)
    assert not torch.allclose(one[:, cut:], other[:, cut:], atol=1e-3)


@torch.no_grad()
def cached_decoding(model: LlmctlForCausalLM) -> None:
    """In pieces, several tokens at a time or one, over a memory: the same as all at once."""
    x = ids()
    full, cache, parts, at = model(x).logits, None, [], 0
    for count in (7, 1, 1, 4, 1, LENGTH - 14):
        out = model(x[:, at : at + count], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + count
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, **CLOSE)


@torch.no_grad()
def row_of_a_batch(model: LlmctlForCausalLM) -> None:
    """A row does not depend on those beside it."""
    x = ids(4)
    together = model(x).logits
    for row in range(4):
        torch.testing.assert_close(together[row], model(x[row : row + 1]).logits[0], **CLOSE)


@torch.no_grad()
def padded_row(model: LlmctlForCausalLM) -> None:
    """Padding before or after a row changes nothing of it."""
    x, room = ids(1), 5
    alone, filled, zeros = model(x).logits, torch.ones_like(x), torch.zeros(1, room, dtype=torch.long)
    before = model(torch.cat([zeros, x], 1), attention_mask=torch.cat([zeros, filled], 1)).logits
    after = model(torch.cat([x, zeros], 1), attention_mask=torch.cat([filled, zeros], 1)).logits
    torch.testing.assert_close(before[:, room:], alone, **CLOSE)
    torch.testing.assert_close(after[:, :-room], alone, **CLOSE)
    # a gap inside, with the positions that `generate` gives
    mask = torch.cat([filled[:, :4], zeros, filled[:, 4:]], 1)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    apart = model(
        torch.cat([x[:, :4], zeros, x[:, 4:]], 1), attention_mask=mask, position_ids=positions
    ).logits
    torch.testing.assert_close(apart[mask == 1], alone[0], **CLOSE)


@torch.no_grad()
def packed_row(model: LlmctlForCausalLM) -> None:
    """Documents that share a row see nothing of each other, nor of the padding behind them."""
    x, lengths, room = ids(), [9, 1, LENGTH - 10], 3
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    packed = model(x, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in x.split(lengths, dim=1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    padded = model(
        F.pad(x, (0, room)),
        attention_mask=F.pad(torch.ones_like(x), (0, room)),
        position_ids=torch.cat([positions, torch.arange(room).expand(2, -1)], 1),
    ).logits
    torch.testing.assert_close(padded[:, :-room], alone, **CLOSE)


def save_and_load(model: LlmctlForCausalLM, folder: Path) -> None:
    """What is written reads back as the same model, to the bit."""
    save_model(model, folder)
    again = load_model(folder)
    spec = model.config.spec
    kept = {"family": "auto", "rope_parameters": spec.rope_parameters}
    if again.config.spec.family == "mixtral":  # has one width, the experts'
        assert again.config.spec.intermediate_of_expert == spec.intermediate_of_expert
        kept |= {"intermediate_size": spec.intermediate_size, "experts": spec.experts}
    assert again.config.spec.model_copy(update=kept) == model.config.spec
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits, atol=0, rtol=0)


def planned_sizes(model: LlmctlForCausalLM) -> None:
    """The planner counts what there is: parameters, and bytes of a decoding."""
    spec = model.config.spec
    assert total_parameters(spec) == sum(weight.numel() for weight in model.parameters())
    assert set(parameters(spec)) == set(PARTS)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    held = sum(state.nbytes for state in cache.states)
    assert held == 2 * kv_cache_bytes(spec, LENGTH, 4)


PROMISES: dict[str, Callable[[LlmctlForCausalLM], None]] = {
    "shape and gradients": shape_and_gradients,
    "no future leak": no_future_leak,
    "cached decoding": cached_decoding,
    "row of a batch": row_of_a_batch,
    "padded row": padded_row,
    "packed row": packed_row,
    "planned sizes": planned_sizes,
}
