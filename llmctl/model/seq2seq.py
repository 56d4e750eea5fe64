"""An encoder–decoder: one stack reads a text both ways, another writes from left to right and looks at it.

Shape legend: B rows, S tokens of the text, T tokens written, E hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from llmctl.kernels.cross_entropy import IGNORE
from llmctl.model.cache import StateCache
from llmctl.model.config import LlmctlConfig
from llmctl.model.context import Memory, context_of
from llmctl.model.families import START, carried
from llmctl.model.hf import LlmctlPreTrainedModel, router_loss
from llmctl.model.routers import Routing
from llmctl.model.stack import Kept, Run, Stack
from llmctl.recipe.model import ModelSection


class HalfStack(nn.Module, Stack):
    """The encoder or the decoder. It is given embeddings; the table belongs to both."""

    def __init__(self, spec: ModelSection, layers: int, cross: bool) -> None:
        super().__init__()
        self.build(spec, embeds=False, layers=layers, cross=cross)


@dataclass
class EncoderOutput(BaseModelOutput):
    """What the encoder gives: `routings` says what each of its layers of experts decided."""

    routings: tuple[Routing, ...] | None = None


@dataclass
class Written:
    """What the decoder gives: final states `hidden` [B, T, E], and what was kept and remembered."""

    hidden: Tensor
    keep: Kept
    cache: Cache | None


class LlmctlEncoderDecoderModel(LlmctlPreTrainedModel):
    """The backbone: an embedding table, an encoder and a decoder."""

    stacks = ("encoder_decoder",)

    def __init__(self, config: LlmctlConfig) -> None:
        super().__init__(config)
        self.spec = config.spec
        assert self.spec.vocab_size is not None
        self.embed_tokens = nn.Embedding(self.spec.vocab_size, self.spec.hidden_size)
        self.encoder = HalfStack(self.spec, self.spec.num_hidden_layers, cross=False)
        self.decoder = HalfStack(
            self.spec, self.spec.num_decoder_layers or self.spec.num_hidden_layers, cross=True
        )
        self.gradient_checkpointing = False
        self.post_init()

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> EncoderOutput:
        """The encoder's states, [B, S, E].

        Args:
            input_ids: [B, S], or `inputs_embeds` [B, S, E].
            attention_mask: [B, S], 1 at real tokens.

        Raises ValueError if not exactly one of ids and embeddings is given.
        """
        x_BSE = self._embedded(input_ids, inputs_embeds)
        ctx = context_of(x_BSE, attention_mask, None, 0, True)
        ctx.causality = "none"
        keep = Kept()
        out = self.encoder.run(self.encoder.embed(x_BSE, ctx), ctx, None, self._call, keep)
        return EncoderOutput(
            last_hidden_state=out,
            hidden_states=tuple(keep.hidden) if output_hidden_states else None,
            routings=tuple(keep.routings) or None,
        )

    def decode(
        self,
        tokens: Tensor,
        memory: Memory,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Written:
        """The decoder's states.

        Args:
            tokens: ids [B, T], or embeddings [B, T, E] in their place.
            memory: the encoder's states.
            attention_mask: [B, past + T], 1 at real tokens.
            position_ids: [B, T]; they may not restart, for all of a row reads the same memory.
            cache: extended in place; a cache of transformers' own classes has no place for the encoder's side.

        Raises ValueError for such a cache, and for one in a pass whose activations are recomputed.
        """
        states = None
        if cache is not None:
            if not isinstance(cache, StateCache):
                raise ValueError(f"{type(cache).__name__} cannot hold what an encoder–decoder remembers")
            if self._call is not None:
                raise ValueError("activations cannot be recomputed with a cache")
            states = cache.states
        x_BTE = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        past = cache.get_seq_length() if cache is not None else 0
        ctx = context_of(x_BTE, attention_mask, position_ids, past, True)
        ctx.memory = memory
        keep = Kept()
        hidden = self.decoder.run(self.decoder.embed(x_BTE, ctx), ctx, states, self._call, keep)
        return Written(hidden, keep, cache)

    def _embedded(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if (ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(ids) if embeds is None else embeds

    @property
    def _call(self) -> Run | None:
        """How a block is run: so that its activations are computed again in the backward pass, or plainly."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return self._gradient_checkpointing_func if recompute else None


class Reader:
    """The encoder as `generate` calls it: from ids, whose table lies outside of it."""

    def __init__(self, model: LlmctlEncoderDecoderModel) -> None:
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> EncoderOutput:
        """As `LlmctlEncoderDecoderModel.encode`; other keywords are hints that say nothing to it."""
        return self.model.encode(input_ids, attention_mask, inputs_embeds, output_hidden_states)

    __call__ = forward


class LlmctlForConditionalGeneration(LlmctlPreTrainedModel, GenerationMixin):
    """Encoder, decoder and output head: a text and what is written so far, to logits or to a loss."""

    stacks = ("encoder_decoder",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlmctlConfig) -> None:
        super().__init__(config)
        self.model = LlmctlEncoderDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> Any:
        """What `generate` calls once, before it writes."""
        return Reader(self.model)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the decoder's final states [..., E], scaled and capped as the config says."""
        spec = self.model.spec
        logits = self.lm_head(hidden if spec.logits_scaling == 1.0 else hidden / spec.logits_scaling)
        cap = spec.final_logit_softcapping
        return logits if cap is None else (logits / cap).tanh() * cap

    def forward(  # noqa: PLR0913  (the names transformers and PEFT pass)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, V], and with `labels` the loss.

        Args:
            input_ids: [B, S], or `inputs_embeds` [B, S, E], or what the encoder gave for them, `encoder_outputs`.
            attention_mask: [B, S], 1 at real tokens of the text.
            decoder_input_ids: [B, T], what is written so far, or its embeddings. When None, the labels
                shifted right by one, with the config's `decoder_start_token_id` first.
            decoder_attention_mask: [B, T] with the cached tokens before, 1 at real tokens.
            past_key_values: a cache that an earlier pass returned, extended in place.
            labels: [B, T], what is to be written at each place; -100 is not trained.
            use_cache: make a cache if none is given. Unset means no.
            num_items_in_batch: trained tokens of the whole optimizer step; the summed loss is
                divided by it. Unset: the trained tokens of this batch.

        Raises ValueError if nothing says what is read or what is written, for output_attentions, which no
        fast path can give, and as `LlmctlEncoderDecoderModel.decode`.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not available: attention weights are never materialised")
        kept = kwargs.get("output_hidden_states")
        if encoder_outputs is None:
            encoder_outputs = self.model.encode(input_ids, attention_mask, inputs_embeds, kept)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0])
        tokens = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        if tokens is None:
            if labels is None:
                raise ValueError("give decoder_input_ids, or labels to make them from")
            tokens = self.prepare_decoder_input_ids_from_labels(labels)
        if use_cache and past_key_values is None and self.model._call is None:
            past_key_values = StateCache(self.model.decoder.init_states(len(tokens)))
        padded = attention_mask is not None and not bool(attention_mask.all())
        memory = Memory(encoder_outputs[0], attention_mask.bool() if padded else None)
        out = self.model.decode(tokens, memory, decoder_attention_mask, decoder_position_ids, past_key_values)
        logits = self.head(out.hidden)
        loss = None
        if labels is not None:
            before = encoder_outputs.routings if isinstance(encoder_outputs, EncoderOutput) else None
            loss = self._loss(logits, labels, [*(before or ()), *out.keep.routings], num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.cache,
            decoder_hidden_states=tuple(out.keep.hidden) if kept else None,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels shifted right by one, after the token that begins; what is not trained becomes padding.

        Raises ValueError where the config has no token to begin with.
        """
        known = carried(self.config)
        start = known[START] if known[START] is not None else known["bos_token_id"]
        if start is None:
            raise ValueError("the config has neither a decoder_start_token_id nor a bos_token_id")
        shifted = F.pad(labels[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == IGNORE, known["pad_token_id"] or 0)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        routings: Sequence[Routing],
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        trained = (labels != IGNORE).sum()
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        if routings:
            loss = loss + trained * router_loss(routings, self.model.spec)
        return loss / (num_items_in_batch if num_items_in_batch is not None else trained)
