"""Whether what a stage made is still what it was made from: bounds, verdicts, and work that was refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl.errors import CheckFailed
from llmctl.model.open import stored_dtype
from llmctl.talk import Talk

ROUNDINGS = 2.0  # how many times what rounding costs a faithful copy may diverge
FAITHFUL = 1e-4  # nats per token that it may diverge where nothing is rounded
SIMILAR = 0.01  # nats per token by which `llmctl compare` lets two models differ


def rounded_dtype(*models: str | Path) -> torch.dtype | None:
    """The precision whose rounding models are held against: that of the narrowest; None if all are float32.

    float16 counts as bfloat16, which every processor computes: its noise is overestimated.
    """
    narrow = any(stored_dtype(model).itemsize < 4 for model in models)
    return torch.bfloat16 if narrow else None


def faithful_kl(found: Mapping[str, Any]) -> float:
    """Nats per token by which a copy may diverge from what it is a copy of."""
    return FAITHFUL + ROUNDINGS * float(found.get("noise_kl", 0.0))


def similar_kl(found: Mapping[str, Any]) -> float:
    """Nats per token by which two models may differ that are compared for no stated reason."""
    return max(SIMILAR, ROUNDINGS * float(found.get("noise_kl", 0.0)))


def out_of_bounds(found: Mapping[str, Any], min_top1: float, max_kl: float) -> list[str]:
    """What the bounds forbid, a sentence each; NaN is out of every bound.

    Agreement is that at decided tokens, where the noise was measured.
    """
    failed = []
    if "decided_top1" in found:
        top1, where = found["decided_top1"], " where rounding decides nothing"
    else:
        top1, where = found["top1"], ""
    if not top1 >= min_top1:
        failed.append(f"top-1 agreement{where} {top1:.4f} is below {min_top1:g}")
    if not found["kl"] <= max_kl:
        shown = "not a number" if math.isnan(found["kl"]) else f"{found['kl']:.4g}"
        failed.append(f"divergence {shown} is above {max_kl:.4g} nats per token")
    return failed


def refuse_drift(failed: list[str], a: str | Path, b: str | Path, hint: str | None = None) -> None:
    """Raise CheckFailed if anything was out of bounds."""
    if failed:
        raise CheckFailed(
            f"{b} is not what {a} is: {'; '.join(failed)}",
            hint or "if that is expected, allow it with compare.min_top1 and compare.max_kl",
        )


def kept_hint(out: Path) -> str:
    """What to do with a result that was refused."""
    return f"it is kept; the same command with --out {out} --accept takes it as it is"


def say_accepted(failed: list[str], accept: bool, talk: Talk) -> None:
    """What a check found wrong with a result that is accepted all the same."""
    if failed and accept:
        talk.say(f"accepted, though its check refuses it: {'; '.join(failed)}")
