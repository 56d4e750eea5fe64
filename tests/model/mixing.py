"""What every mixer promises, as tests over a stack; a test file gives them its own towers by a fixture `tower`.

The comparisons are of float32 sums in another order, on numbers of about 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmctl.model.context import Context, packed_context, padded_context, plain_context
from llmctl.model.init import initialize
from llmctl.model.stack import Stack
from llmctl.plan.size import kv_cache_bytes, total_parameters
from llmctl.recipe.model import ModelSection

VOCAB, LENGTH = 61, 20
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


class Tower(nn.Module, Stack):
    """A stack and nothing around it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.build(ModelSection(**{**SMALL, **settings}).resolved())
        initialize(self, self.spec, seed=1)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in self.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        self.eval()

    def forward(self, ids: torch.Tensor, ctx: Context | None = None, states: Any = None) -> torch.Tensor:
        ctx = ctx if ctx is not None else plain_context(ids.shape[1])
        if self.spec.stack == "encoder":
            ctx.causality = "none"
        return self.run(self.embed(ids, ctx), ctx, states)

    def decoded(self, ids: torch.Tensor, pieces: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
        """The same as `forward`, in pieces of so many tokens that go on from each other."""
        states, past, found = self.init_states(ids.shape[0]), 0, []
        for length in pieces:
            end = past + length
            ctx = plain_context(length, past) if mask is None else padded_context(mask[:, :end], length)
            found.append(self(ids[:, past:end], ctx, states))
            past = end
        assert past == ids.shape[1] and all(state.length == past for state in states)
        return torch.cat(found, dim=1)


def ids(rows: int = 2, length: int = LENGTH, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def masked(side: str, lengths: tuple[int, ...] = (LENGTH, 13)) -> torch.Tensor:
    """An attention mask whose rows have so many real tokens, padded on that side."""
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(LENGTH - length, None) if side == "left" else slice(length)] = 1
    return mask


class Contracts:
    """Tests of any tower."""

    def test_shape_and_finite_gradients(self, tower: Tower) -> None:
        tower.train()
        out = tower(ids())
        assert out.shape == (2, LENGTH, SMALL["hidden_size"])
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        for name, weight in tower.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name

    @torch.no_grad()
    def test_row_of_a_batch_equals_single(self, tower: Tower) -> None:
        x = ids(3)
        together = tower(x)
        for row in range(3):
            close(together[row : row + 1], tower(x[row : row + 1]))

    @torch.no_grad()
    def test_packed_equals_separate(self, tower: Tower) -> None:
        lengths = [7, 1, 9, 3]
        positions = torch.cat([torch.arange(n) for n in lengths])
        for by_span in (True, False):
            packed = tower(ids(1), packed_context(positions[None], by_span))
            parts = zip(ids(1).split(lengths, 1), packed.split(lengths, 1), strict=True)
            for document, found in parts:
                close(found, tower(document))

    @torch.no_grad()
    def test_padded_equals_single(self, tower: Tower) -> None:
        for side in ("left", "right"):
            mask = masked(side)
            found = tower(ids(), padded_context(mask, LENGTH))
            for row in range(2):
                real = mask[row].bool()
                close(found[row, real], tower(ids()[row : row + 1, real])[0])

    @torch.no_grad()
    def test_packed_and_padded_equals_separate(self, tower: Tower) -> None:
        documents = torch.cat([torch.arange(4), torch.arange(9)])
        for side, first in (("left", LENGTH - 13), ("right", 0)):
            positions = torch.zeros(2, LENGTH, dtype=torch.long)
            positions[0], positions[1, first : first + 13] = torch.arange(LENGTH), documents
            found = tower(ids(), padded_context(masked(side), LENGTH, positions))
            close(found[:1], tower(ids()[:1]))
            for start, end in ((first, first + 4), (first + 4, first + 13)):
                close(found[1:, start:end], tower(ids()[1:, start:end]))

    def test_half_precision_is_near(self, tower: Tower) -> None:
        expected = tower(ids())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = tower(ids())
        assert found.isfinite().all()
        assert (found - expected).square().mean() < 0.1 * expected.square().mean()


class CausalContracts(Contracts):
    """Tests of towers in which nothing looks ahead."""

    @torch.no_grad()
    def test_later_tokens_do_not_leak(self, tower: Tower) -> None:
        x, changed = ids(), ids()
        changed[:, 11:] = (changed[:, 11:] + 1) % VOCAB
        close(tower(x)[:, :11], tower(changed)[:, :11])
        assert not torch.allclose(tower(x)[:, 11:], tower(changed)[:, 11:], atol=1e-3)

    @torch.no_grad()
    def test_decoding_equals_full_forward(self, tower: Tower) -> None:
        full = tower(ids())
        for pieces in ([1] * LENGTH, [7, 1, 1, 5, 1, 1, 4], [LENGTH - 1, 1]):
            close(tower.decoded(ids(), pieces), full)

    @torch.no_grad()
    def test_decoding_padded_rows_equals_single(self, tower: Tower) -> None:
        # padding to the left, and in the middle: a padded prompt that is gone on from
        between = torch.ones(2, LENGTH, dtype=torch.long)
        between[1, 5:8] = 0
        for mask in (masked("left"), between):
            found = tower.decoded(ids(), [9, 1, 1, 6, 1, 1, 1], mask)
            whole = tower(ids(), padded_context(mask, LENGTH))
            for row in range(2):
                real = mask[row].bool()
                alone = tower(ids()[row : row + 1, real])[0]
                close(found[row, real], alone)
                close(whole[row, real], alone)

    @torch.no_grad()
    def test_rows_are_reordered(self, tower: Tower) -> None:
        x, order = ids(3), torch.tensor([2, 0, 0])
        states = tower.init_states(3)
        tower(x[:, :8], None, states)
        for state in states:
            state.reorder(order)
            assert state.rows == 3
        found = tower(x[:, 8:], plain_context(LENGTH - 8, 8), states)
        close(found, tower(torch.cat([x[order, :8], x[:, 8:]], 1))[:, 8:])

    @torch.no_grad()
    def test_planned_sizes_are_those_held(self, tower: Tower) -> None:
        assert sum(weight.numel() for weight in tower.parameters()) == total_parameters(tower.spec)
        states = tower.init_states(1)
        tower(ids(1), None, states)
        assert sum(state.nbytes for state in states) == kv_cache_bytes(tower.spec, LENGTH, 4)

    @torch.no_grad()
    def test_tokens_are_taken_back(self, tower: Tower) -> None:
        x, states = ids(), tower.init_states(2)
        tower(torch.cat([x[:, :6], ids(seed=5)[:, 6:]], 1), None, states)
        left = {state.cut(6) for state in states}
        assert len(left) == 1  # all layers, or none
        kept = left.pop()
        assert kept in (0, 6)
        found = tower(x[:, kept:], plain_context(LENGTH - kept, kept), states)
        close(found, tower(x)[:, kept:])
