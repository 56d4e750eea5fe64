"""How fast models decode, measured in turn so that what else the machine does meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.kernels.threads import steady_threads
from llmctl.model import LlmctlForCausalLM

ROUNDS = 3


def decoding_speeds(
    models: Sequence[LlmctlForCausalLM],
    prompt_ids: list[int],
    tokens: int,
    tell: Callable[[int], None] = lambda tokens: None,
) -> list[float]:
    """Tokens per second of each model, greedy, after the first token: the median of some rounds.

    Args:
        tokens: new tokens in a round, at least 2; with the prompt they must fit the models' contexts.
        tell: told of the tokens of each round of each model; there are `ROUNDS`.
    """
    found: list[list[float]] = [[] for _ in models]
    with steady_threads():
        for _ in range(ROUNDS):
            for model, speeds in zip(models, found, strict=True):
                speeds.append(decoding_speed(model, prompt_ids, tokens))
                tell(tokens)
    return [median(speeds) for speeds in found]


def decoding_speed(model: LlmctlForCausalLM, prompt_ids: list[int], tokens: int) -> float:
    """Tokens per second of one greedy continuation, after its first token."""
    new = generate(model, prompt_ids, tokens, likeliest)
    next(new)  # the prompt is read here
    started = time.perf_counter()
    count = sum(1 for _ in new)
    return count / (time.perf_counter() - started)
