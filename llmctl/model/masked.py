"""An encoder with a masked-language-model head: every token is guessed from both sides."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from llmctl.kernels.cross_entropy import IGNORE
from llmctl.model.config import LlmctlConfig
from llmctl.model.ffn import Activation, gelu_tanh, relu2
from llmctl.model.hf import LlmctlModel, LlmctlPreTrainedModel, RoutedOutput, router_loss
from llmctl.model.norms import NORMS
from llmctl.recipe.model import ModelSection


class Transform(nn.Module):
    """norm(act(dense(x))), [..., E] -> [..., E], before the table is read backwards (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.norm = NORMS[model.norm](model.hidden_size, model.norm_eps)
        self.activation = ACTIVATIONS.get(model.ffn, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class LlmctlForMaskedLM(LlmctlPreTrainedModel):
    """Encoder, transform and output head with a bias: token ids to logits at their own places, or to a loss."""

    stacks = ("encoder",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlmctlConfig) -> None:
        super().__init__(config)
        self.model = LlmctlModel(config)
        self.transform = Transform(config.spec)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., E], scaled and capped as the config says."""
        spec = self.model.spec
        logits = self.lm_head(self.transform(hidden) / spec.logits_scaling)
        cap = spec.final_logit_softcapping
        return logits if cap is None else (logits / cap).tanh() * cap

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, V], and with `labels` the loss.

        Args:
            token_type_ids: [B, T] kinds of tokens; 0 when None.
            labels: [B, T], what stands at each place, without a shift; -100 is not trained.
            num_items_in_batch: trained tokens of the whole optimizer step; the summed loss is
                divided by it. Unset: the trained tokens of this batch.

        Raises ValueError as the backbone does.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.head(out.last_hidden_state)
        loss = None
        if labels is not None:
            trained = (labels != IGNORE).sum()
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            if isinstance(out, RoutedOutput) and out.routings:
                loss = loss + trained * router_loss(out.routings, self.model.spec)
            loss = loss / (num_items_in_batch if num_items_in_batch is not None else trained)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


# the feed-forward layers' activation is the head's too; gated ones have none that stands alone
ACTIVATIONS: dict[str, Activation] = {"gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": relu2}
