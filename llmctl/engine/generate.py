"""One sequence, token by token: prefill, then decode over memory written in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from llmctl.model import LlmctlForCausalLM
from llmctl.model.context import plain_context


@torch.inference_mode()
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
    stack, head = model.model, model.lm_head
    device = stack.embed_tokens.weight.device
    states = stack.init_states(1, len(prompt_ids) + max_new_tokens)
    ids, past = torch.tensor([prompt_ids], device=device), 0
    for _ in range(max_new_tokens):
        ctx = plain_context(ids.shape[1], past, device)
        hidden = stack.run(stack.embed_tokens(ids), ctx, states)
        past += ids.shape[1]
        token = int(sample(head(hidden[:, -1])))
        yield token
        if token in stop_ids:
            return
        ids = torch.tensor([[token]], device=device)
