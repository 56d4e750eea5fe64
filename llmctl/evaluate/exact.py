"""Exact completion: does greedy decoding after a prompt give exactly these tokens?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmctl.kernels.device import Compute
from llmctl.kernels.threads import Work, timed
from llmctl.model import LlmctlForCausalLM

Pair = tuple[list[int], list[int]]  # prompt ids and the ids that should follow
WORK = Work("exact completion", "tokens")


@torch.no_grad()
def exact_matches(
    model: LlmctlForCausalLM,
    pairs: Sequence[Pair],
    compute: Compute,
    batch_size: int = 64,
    tell: Callable[[int], None] = lambda count: None,
) -> list[bool]:
    """For each pair, whether greedy decoding after the prompt would produce the completion.

    One forward pass over prompt and completion answers it: decoding gives the completion exactly
    if every one of its tokens is the likeliest after the ones before it. `tell` is told how many pairs were read.

    Raises ValueError for an empty prompt or completion.
    """
    if any(not prompt or not completion for prompt, completion in pairs):
        raise ValueError("a pair needs a prompt and a completion")
    found: list[bool] = []
    for at in range(0, len(pairs), batch_size):
        part = pairs[at : at + batch_size]
        longest = max(len(prompt) + len(completion) for prompt, completion in part)
        ids, mask = (
            torch.zeros(len(part), longest, dtype=torch.long),
            torch.zeros(len(part), longest, dtype=torch.long),
        )
        for row, (prompt, completion) in enumerate(part):
            ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            mask[row, : len(prompt) + len(completion)] = 1
        with compute.autocast(), timed(WORK, ids.numel()):
            logits = model(ids.to(compute.device), attention_mask=mask.to(compute.device)).logits
        likeliest = logits.argmax(-1).cpu()
        for row, (prompt, completion) in enumerate(part):
            said = likeliest[row, len(prompt) - 1 : len(prompt) + len(completion) - 1]
            found.append(said.tolist() == completion)
        tell(len(part))
    return found
