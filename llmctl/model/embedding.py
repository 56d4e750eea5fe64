"""A text as one vector: the mean of its tokens' hidden states (Reimers and Gurevych 2019, arXiv:1908.10084)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmctl.model.hf import LlmctlModel


def embed(
    model: LlmctlModel,
    ids: Tensor,
    mask: Tensor | None = None,
    types: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """Embeddings [B, E] of rows of tokens, in float32.

    Args:
        model: the backbone, of an encoder or a decoder.
        ids: [B, T].
        mask: [B, T], 1 at real tokens; all are when None.
        types: [B, T] kinds of tokens; 0 when None.
        normalize: give each the length 1, so that a product of two is their cosine.
    """
    out = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
    mean = mean_of_real(out.last_hidden_state.float(), mask)
    return F.normalize(mean, dim=-1) if normalize else mean


def mean_of_real(hidden_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The mean over the real tokens of each row, [B, E]; 0 for a row without any."""
    if mask_BT is None:
        return hidden_BTE.mean(1)
    real = mask_BT[..., None].to(hidden_BTE.dtype)
    return (hidden_BTE * real).sum(1) / real.sum(1).clamp(min=1)
