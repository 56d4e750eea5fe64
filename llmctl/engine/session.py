"""One sequence that grows turn by turn: what was read stays in memory, and only what is new is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import cast

import torch
from torch import Tensor

from llmctl.model import LlmctlForCausalLM
from llmctl.model.context import plain_context
from llmctl.model.state import DenseState


class Session:
    """Keys and values of one row, written in place.

    The memory is made as large as a turn asks for, and at least doubles when a later turn asks for more.

    Attributes:
        ids: the tokens that are held, from the first.
    """

    def __init__(self, model: LlmctlForCausalLM) -> None:
        self.ids: list[int] = []
        self._stack, self._head = model.model, model.lm_head
        self._longest: int = model.config.max_position_embeddings
        self._capacity = 0
        self._states: list[DenseState] = []

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        sample: Callable[[Tensor], Tensor],
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """New token ids after the prompt, one at a time; as `engine.generate.generate`.

        Of the prompt, what is held already is not run again. The iterator may be left at any time, by an
        exception inside a pass too: the next call goes by what was read for certain.

        Args:
            prompt_ids: the whole sequence so far, at least one id; with the new tokens it must fit the
                model's context.
            sample: logits [1, V] -> ids [1], from `sampling.sampler`.
        """
        # the last id is run in any case: its logits were not kept
        self._forget_after(min(_shared(self.ids, prompt_ids), len(prompt_ids) - 1))
        self._reserve(len(prompt_ids) + max_new_tokens)
        new = prompt_ids[len(self.ids) :]
        for _ in range(max_new_tokens):
            token = int(sample(self._read(new)))
            yield token
            if token in stop_ids:
                return
            new = [token]

    def _read(self, ids: list[int]) -> Tensor:
        """Run new tokens; logits [1, V] after the last one."""
        device = self._stack.embed_tokens.weight.device
        ctx = plain_context(len(ids), len(self.ids), device)
        embedded = self._stack.embed_tokens(torch.tensor([ids], device=device))
        hidden = self._stack.run(embedded, ctx, self._states)
        self.ids += ids
        return self._head(hidden[:, -1])

    def _forget_after(self, length: int) -> None:
        del self.ids[length:]
        for state in self._states:
            # a pass that was broken off wrote into some of the layers only
            state.length = length

    def _reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        self._capacity = max(capacity, min(2 * self._capacity, self._longest))
        # the mixers there are keep dense states, which can be cut back
        made = cast(list[DenseState], self._stack.init_states(1, self._capacity))
        for old, new in zip(self._states, made, strict=False):
            new.append(old.keys[:, :, : old.length], old.values[:, :, : old.length])
        self._states = made


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids two sequences begin with alike."""
    both = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))
