"""Learning-rate schedules: pure functions of the step, so there is no state to save or lose."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAY_SHARE = 0.2  # of a warmup-stable-decay run


def _cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2016, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(progress: float) -> float:
    return 1.0


def _warmup_stable_decay(progress: float) -> float:
    """Flat, then linear over the last fifth (Hu et al. 2024, arXiv:2404.06395)."""
    return min(1.0, (1 - progress) / DECAY_SHARE)


# progress through the run after warmup, 0 … 1 -> share of the way between final (0) and peak (1) rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "warmup_stable_decay": _warmup_stable_decay,
}


def learning_rate(
    step: int, steps: int, *, peak: float, kind: str, warmup_ratio: float, min_ratio: float
) -> float:
    """The learning rate of 0-based `step` among `steps`: linear warmup to `peak`, then `kind` down to `min_ratio`.

    `constant` ignores `min_ratio`.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    share = SCHEDULES[kind](min(1.0, progress))
    return peak * (min_ratio + (1 - min_ratio) * share)
