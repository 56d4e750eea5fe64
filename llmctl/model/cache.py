"""Our states as transformers sees a cache, and transformers' caches as our states see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from llmctl.model.state import FixedPast, State, TokenState


class StateCache(Cache):
    """The states of all layers. Mixers write into them; nothing of transformers looks inside."""

    def __init__(self, states: Sequence[State]) -> None:
        super().__init__(layers=[])
        self.states = list(states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are held."""
        return self.states[layer_idx].length

    @property
    def is_compileable(self) -> bool:
        """Memory grows, so its shapes are not fixed."""
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def frozen(self) -> list[FixedPast] | None:
        """What is held, to be read only; None if nothing is. Raises ValueError where it cannot be read alone."""
        if self.get_seq_length() == 0:
            return None
        kept = [state for state in self.states if isinstance(state, TokenState)]
        if len(kept) < len(self.states):
            raise ValueError("activations cannot be recomputed after the past of such a layer")
        return [FixedPast(*(part[:, :, : state.length] for part in state.parts)) for state in kept]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row `beam_idx[i]` was."""
        for state in self.states:
            state.reorder(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.reorder_cache(torch.arange(self.states[0].rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, or all after the first `tokens_to_remove` if positive.

        Raises ValueError where a layer cannot take tokens back.
        """
        held = self.get_seq_length()
        length = held + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if any(state.cut(length) != min(length, held) for state in self.states):
            raise ValueError("a state-space layer cannot forget single tokens")


class ForeignState:
    """One layer of a cache that is transformers' own, such as a learned prefix, seen as a mixer's state."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    @property
    def length(self) -> int:
        return self.cache.get_seq_length(self.layer)

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, ...]:
        """As `KeyValueState.append`."""
        return self.cache.update(k_BGTD, v_BGTD, self.layer)
