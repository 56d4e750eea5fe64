"""Sums since the last line of metrics. A checkpoint keeps them, so that a resumed run writes the same lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmctl.train.trainers import Seen


class Window:
    """Sums of the loop since the last line of metrics."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.tokens, self.seconds = 0, 0.0
        self.norm: Tensor | None = None
        self.rate = 0.0

    def add(self, loss: Tensor, tokens: int, seconds: float, norm: Tensor, rate: float) -> None:
        self.loss += loss * tokens
        self.tokens += tokens
        self.seconds += seconds
        self.norm, self.rate = norm, rate

    def state(self) -> dict[str, float]:
        """The sums, for a checkpoint; norm and rate are of the step that comes before the next line."""
        return {"loss": float(self.loss), "tokens": self.tokens, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint; one of an older version has none."""
        self.loss += state.get("loss", 0.0)
        self.tokens, self.seconds = state.get("tokens", 0), state.get("seconds", 0.0)

    def take(self) -> dict[str, float]:
        row = {
            "loss": float(self.loss) / max(1, self.tokens),
            "grad_norm": float(self.norm) if self.norm is not None else 0.0,
            "learning_rate": self.rate,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
        }
        self._clear()
        return row


class PairMeans:
    """Means over pairs, of one step or several."""

    def __init__(self) -> None:
        self.loss = 0.0  # summed over pairs
        self.pairs = self.tokens = 0
        self.figures: dict[str, float] = {}

    def add(self, seen: Seen) -> None:
        self.pairs += seen.pairs
        self.tokens += seen.tokens
        self.loss += float(seen.loss.detach()) * seen.pairs
        for name, value in seen.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value * seen.pairs

    def merge(self, other: PairMeans) -> None:
        self.pairs += other.pairs
        self.tokens += other.tokens
        self.loss += other.loss
        for name, value in other.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"loss": self.loss, "pairs": self.pairs, "tokens": self.tokens, "figures": self.figures}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint; one of an older version has none."""
        self.loss, self.figures = state.get("loss", 0.0), dict(state.get("figures", {}))
        self.pairs, self.tokens = state.get("pairs", 0), state.get("tokens", 0)

    def means(self) -> dict[str, float]:
        pairs = max(1, self.pairs)
        return {"loss": self.loss / pairs, **{name: value / pairs for name, value in self.figures.items()}}
