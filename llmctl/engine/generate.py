"""One sequence, token by token: prefill, then decode over memory written in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from llmctl.engine.session import Session
from llmctl.model import LlmctlForCausalLM


def generate(
    model: LlmctlForCausalLM,
    prompt_ids: list[int],
    max_new_tokens: int,
    sample: Callable[[Tensor], Tensor],
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """New token ids, one at a time; ends after a stop id (which is yielded) or `max_new_tokens`.

    Args:
        prompt_ids: at least one id; prompt and new tokens must fit the model's context.
        sample: logits [1, V] -> ids [1], from `sampling.sampler`.
    """
    return Session(model).generate(prompt_ids, max_new_tokens, sample, stop_ids)
