"""How well a model predicts text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.kernels.cross_entropy import IGNORE
from llmctl.kernels.device import Compute
from llmctl.kernels.threads import timed_batches
from llmctl.model import LlmctlForCausalLM


@dataclass(frozen=True)
class Score:
    """Sums over a text; every figure follows from them.

    Attributes:
        nats: negative log-likelihood of all predicted tokens.
        text_nats: of those among them that stand for text, not for its end.
        tokens: predicted tokens.
        bytes: UTF-8 bytes of the text they stand for.
    """

    nats: float
    text_nats: float
    tokens: int
    bytes: float

    def figures(self) -> dict[str, float]:
        """loss (nats per token), perplexity, bits_per_byte, tokens, bytes.

        Bits per byte leave out the end tokens: a text's bytes do not contain them, so models with
        different tokenizers compare fairly.
        """
        loss = self.nats / max(1, self.tokens)
        return {
            "loss": loss,
            "perplexity": math.inf if loss >= 700 else math.exp(loss),  # NaN stays NaN
            "bits_per_byte": self.text_nats / math.log(2) / self.bytes if self.bytes else math.nan,
            "tokens": self.tokens,
            "bytes": round(self.bytes),
        }


@torch.no_grad()
def score(
    model: LlmctlForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    text_bytes: float,
    compute: Compute,
) -> Score:
    """Score batches of input_ids, labels and position_ids, [B, T] each, and is_end, bool [B, T], where there is text.

    Args:
        text_bytes: UTF-8 bytes of the text that the labels stand for, but for those at `is_end`.
    """
    nats = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    for batch in timed_batches(batches, model):
        moved = {name: value.to(compute.device) for name, value in batch.items()}
        labels = moved["labels"][:, 1:].flatten()
        tokens += int((labels != IGNORE).sum())
        # by place, not by id: an unknown token that is the padding or end token too stands for text all the same
        ends = moved.get("is_end", torch.zeros_like(moved["labels"], dtype=torch.bool))
        is_end = ends[:, 1:].flatten()
        with compute.autocast():
            hidden = model.model(moved["input_ids"], position_ids=moved["position_ids"]).last_hidden_state
            flat = hidden[:, :-1].flatten(0, 1)
            for index, part in enumerate((is_end, ~is_end)):
                kept = labels.masked_fill(~part, IGNORE)
                nats[index] += model.nats(flat, kept).cpu().double()
    return Score(float(nats.sum()), float(nats[1]), tokens, text_bytes)
