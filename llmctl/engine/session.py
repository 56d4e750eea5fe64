"""One sequence that grows turn by turn: what was read stays in memory, and only what is new is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from llmctl.kernels.threads import Work, count_work
from llmctl.model import LlmctlForCausalLM
from llmctl.model.context import plain_context
from llmctl.model.state import State


class Session:
    """What the layers remember of one row, written in place.

    The memory is made as large as a turn asks for, and at least doubles when a later turn asks for more.

    Attributes:
        ids: the tokens that are held, from the first.
    """

    def __init__(self, model: LlmctlForCausalLM) -> None:
        self.ids: list[int] = []
        self._stack, self._head = model.model, model.head
        self._states: list[State] = []
        self._longest: int = model.config.max_position_embeddings
        self._work = Work("decoding", "tokens", id(model.model))

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
        room = len(prompt_ids) + max_new_tokens
        if not self._states:
            self._states = self._stack.init_states(1, room)
        for state in self._states:
            state.reserve(room, self._longest)
        new = prompt_ids[len(self.ids) :]
        for _ in range(max_new_tokens):
            started = time.perf_counter()
            token = int(sample(self._read(new)))
            if len(new) == 1:  # reading a prompt is other work
                count_work(self._work, 1, time.perf_counter() - started)
            yield token
            if token in stop_ids:
                return
            new = [token]

    def _read(self, ids: list[int]) -> Tensor:
        """Run new tokens; logits [1, V] after the last one."""
        device = self._stack.embed_tokens.weight.device
        ctx = plain_context(len(ids), len(self.ids), device)
        embedded = self._stack.embed(torch.tensor([ids], device=device), ctx)
        hidden = self._stack.run(embedded, ctx, self._states)
        self.ids += ids
        return self._head(hidden[:, -1])

    def _forget_after(self, length: int) -> None:
        # a pass that was broken off wrote into some of the layers only, and some layers forget all or nothing
        for _ in range(2):
            length = min([length, *(state.cut(length) for state in self._states)])
        del self.ids[length:]


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids two sequences begin with alike."""
    both = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))
