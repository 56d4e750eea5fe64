"""What a reward model says of whole sequences, and how well it tells the wanted from the unwanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmctl.kernels.device import Compute
from llmctl.kernels.threads import Work, timed
from llmctl.model import LlmctlForSequenceClassification

WORK = Work("scoring", "tokens")


@torch.no_grad()
def scores(
    model: LlmctlForSequenceClassification,
    sequences: Sequence[list[int]],
    compute: Compute,
    batch_size: int,
    tell: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """The score of each sequence of token ids; sequences of like length are read together.

    `tell` is told how many were read.
    """
    model.eval()
    found = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    pad = model.config.pad_token_id
    fill = 0 if pad is None or pad < 0 else pad  # masked; -1 is how some configs say that there is none
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(sequences[chosen[-1]])
        ids = torch.full((len(chosen), longest), fill)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(chosen):
            ids[row, : len(sequences[number])] = torch.tensor(sequences[number])
            mask[row, : len(sequences[number])] = 1
        device = compute.device
        with compute.autocast(), timed(WORK, ids.numel()):
            logits = model(ids.to(device), attention_mask=mask.to(device)).logits
        for number, value in zip(chosen, logits[:, 0].tolist(), strict=True):
            found[number] = value
        tell(len(chosen))
    return found


def above(wanted: Sequence[float], unwanted: Sequence[float]) -> float:
    """How often a wanted answer scores above an unwanted one, over all of both, ties counting half (AUC).

    Raises ValueError if either is empty.
    """
    if not wanted or not unwanted:
        raise ValueError("there must be answers of both kinds")
    ordered = sorted([(score, False) for score in unwanted] + [(score, True) for score in wanted])
    total, below, at = 0.0, 0, 0
    while at < len(ordered):
        end = at
        while end < len(ordered) and ordered[end][0] == ordered[at][0]:
            end += 1
        good = sum(is_wanted for _, is_wanted in ordered[at:end])
        bad = end - at - good
        total += good * (below + bad / 2)
        below, at = below + bad, end
    return total / (len(wanted) * len(unwanted))
