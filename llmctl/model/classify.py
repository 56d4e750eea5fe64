"""A backbone with a score head: a reward model, or a classifier, as transformers' `…ForSequenceClassification`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from llmctl.errors import UserError
from llmctl.files import read_json
from llmctl.locate import locate
from llmctl.model.adapters import ADAPTER_CONFIG, TASKS, attach, fold, is_adapter
from llmctl.model.checkpoint import FILES, load_model
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import config_in
from llmctl.model.hf import LlmctlForCausalLM, LlmctlModel, LlmctlPreTrainedModel
from llmctl.model.init import fill
from llmctl.model.open import as_trained, base_of, open_base, open_folded

SCORER = "ForSequenceClassification"


class Pooler(nn.Module):
    """tanh(dense(x)), [..., E] -> [..., E], of an encoder's first token (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.dense(x).tanh(), self.dropout, self.training)


class LlmctlForSequenceClassification(LlmctlPreTrainedModel):
    """Backbone and `score`, a matrix [labels, hidden].

    A decoder is read at each row's last real token, an encoder at the first, through a `pooler`; there
    `score` has a bias.
    """

    stacks = ("decoder", "encoder")

    def __init__(self, config: LlmctlConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlmctlModel(config)
        encoder = config.spec.stack == "encoder"
        self.pooler = Pooler(config.hidden_size, config.spec.hidden_dropout) if encoder else None
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=encoder)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, labels], and with `labels` transformers' loss for them.

        The last real token is the last that is neither masked nor the config's pad token, on whichever
        side the padding stands; transformers looks for the pad token only, so give it the same.

        Raises ValueError for several rows with neither a mask nor a pad token to tell where they end.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        if self.pooler is not None:
            pooled = self.pooler(hidden[rows, 0 if attention_mask is None else attention_mask.argmax(-1)])
        else:
            pooled = hidden[rows, _last(hidden, input_ids, attention_mask, self.config.pad_token_id)]
        # one product a row: in bfloat16 it would cost nothing less, and blur the scores that are compared
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.score(pooled.to(next(self.score.parameters()).dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def _last(hidden: Tensor, ids: Tensor | None, mask: Tensor | None, pad: int | None) -> Tensor | int:
    """The position to pool, one a row."""
    rows, length = hidden.shape[:2]
    known = ids is not None and pad is not None
    if not known and mask is None:
        if rows > 1:
            raise ValueError("several rows, but neither an attention_mask nor a pad_token_id")
        return length - 1
    real = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
    if mask is not None:
        real &= mask[:, -length:].bool()
    if known:
        real &= ids != pad
    return (torch.arange(length, device=hidden.device) * real).argmax(-1)


def from_language_model(
    language: LlmctlForCausalLM, seed: int, num_labels: int = 1
) -> LlmctlForSequenceClassification:
    """A classifier over a language model's own backbone, which the two then share.

    The head is small and random, the same for the same seed everywhere.
    """
    config = copy.deepcopy(language.config)
    config.num_labels, config.architectures = num_labels, None
    with torch.device("meta"):
        model = LlmctlForSequenceClassification(config)
    model.model = language.model
    weight = torch.empty(model.score.weight.shape, dtype=language.dtype)
    fill(weight, "normal", config.spec, torch.Generator().manual_seed(seed))
    model.score.weight = nn.Parameter(weight.to(language.device))
    return model.eval()


def open_or_begin(
    where: str | Path, seed: int, dtype: torch.dtype | None = None
) -> LlmctlForSequenceClassification:
    """The model to train a reward model from: one there is, or a new head on a language model.

    Raises UserError as `open_scorer` and `open_folded` do.
    """
    folder = locate(str(where), FILES)
    if _is_scorer(folder):
        return open_scorer(folder, dtype)
    return from_language_model(open_folded(folder, dtype), seed)


def open_scorer(
    where: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LlmctlForSequenceClassification:
    """The reward model in a folder; an adapter's is folded into its base.

    Raises UserError: as `load_model` and `attach`, and for what is a language model.
    """
    folder = locate(str(where), FILES)
    if not is_adapter(folder):
        return load_model(folder, dtype, device, LlmctlForSequenceClassification)
    if not _is_scorer(folder):
        raise UserError(
            f"{where}: holds an adapter of a language model, not a reward model", "`llmctl reward` trains one"
        )
    # folded in float32: bfloat16 would round twice
    folded = fold(attach(_base(folder), folder))
    return folded.to(device=device, dtype=dtype) if dtype else folded.to(device)


def _base(folder: Path) -> LlmctlForSequenceClassification:
    """What a reward adapter was trained on, in float32; its own head is in the adapter."""
    base = locate(base_of(folder), FILES)
    if _is_scorer(base):
        return as_trained(open_scorer(base, torch.float32), folder)
    return from_language_model(open_base(folder, torch.float32), seed=0)


def _is_scorer(folder: Path) -> bool:
    if is_adapter(folder):
        return bool(read_json(folder / ADAPTER_CONFIG).get("task_type") == TASKS["reward"])
    return any(name.endswith(SCORER) for name in config_in(folder).architectures or [])
