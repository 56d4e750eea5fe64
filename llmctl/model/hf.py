"""The Hugging Face rim: the only file that knows transformers' model classes, caches and outputs.

Inside is the plain `Stack`. Here it gets the signature that transformers' `generate`, PEFT and TRL
call, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llmctl.files import write_json
from llmctl.kernels.cross_entropy import IGNORE, linear_cross_entropy
from llmctl.locate import locate
from llmctl.model import families
from llmctl.model.config import LlmctlConfig
from llmctl.model.context import Context, packed_context, padded_context, plain_context
from llmctl.model.init import fill, role_of
from llmctl.model.keymap import Rule, to_disk
from llmctl.model.stack import Stack
from llmctl.model.state import FixedPast, KeyValueState


class CacheState:
    """One layer of a transformers cache, seen as a mixer's state."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(k_BGTD, v_BGTD, self.layer)


class LlmctlPreTrainedModel(PreTrainedModel):
    """What transformers asks of every class of a family."""

    config_class = LlmctlConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' own convention)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for parameters a checkpoint did not hold, such as a new head."""
        for name, weight in module.named_parameters(recurse=False):
            if not getattr(weight, "_is_hf_initialized", False):
                kind = "norm." if "norm" in type(module).__name__.lower() else "."
                fill(weight, role_of(kind + name), self.config.spec)

    @classmethod
    def from_pretrained(
        cls, where: str | Path, *args: Any, config: LlmctlConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' loader, for what only it can do (quantizing on load, device maps).

        Reads any family whose tensors have Llama's names; `checkpoint.load_model` reads them all.
        """
        if config is None:
            folder = locate(str(where), ["*.json", "*.safetensors"])
            config = families.config_in(folder)
            where = folder
        return super().from_pretrained(where, *args, config=config, **kwargs)

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write the model as the family that expresses it (`families.write_config`).

        Raises UserError if `config.family` names a family that cannot.
        """
        fields, rules = self.disk_form()
        if rules:
            state_dict = to_disk(state_dict if state_dict is not None else self.state_dict(), rules)
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        path = Path(save_directory) / "config.json"
        if path.is_file():  # an adapter is saved without a config
            write_json(path, fields)

    def disk_form(self) -> tuple[dict[str, Any], tuple[Rule, ...]]:
        """What `config.json` says of this model, and how its tensors are named on disk."""
        name, fields = families.write_config(self.config)
        family = families.FAMILIES.get(name)
        written = type(self).__name__.replace("Llmctl", family.prefix) if family else type(self).__name__
        about = {"dtype": str(self.dtype).removeprefix("torch."), "architectures": [written]}
        return fields | about, family.rules if family else ()


class LlmctlModel(LlmctlPreTrainedModel, Stack):
    """The backbone: token ids to hidden states."""

    def __init__(self, config: LlmctlConfig) -> None:
        super().__init__(config)
        self.build(config.spec)
        self.gradient_checkpointing = False
        self.attends_by_span = True
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, [B, T, E].

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, E].
            attention_mask: [B, S], 1 at real tokens; S counts cached tokens too.
            position_ids: [B, T]. Without cached tokens, positions that restart within a row begin a
                new document, which sees nothing of the ones before it.
            past_key_values: a transformers cache, extended in place; only read, and not returned,
                where activations are recomputed in the backward pass.
            use_cache: make a cache if none is given. Unset means no.
            kwargs: other libraries' hints, such as `cu_seq_lens_q`; positions already say the same.

        Raises ValueError if not exactly one of ids and embeddings is given, for a mask that is not
        two-dimensional, and for output_attentions, which no fast path can give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not available: attention weights are never materialised")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        ctx = _context(x, attention_mask, position_ids, past, self.attends_by_span)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        states = None if past_key_values is None else self._states(past_key_values, frozen=recompute)
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        call = self._gradient_checkpointing_func if recompute else None
        out = self.run(x, ctx, states, call, hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=out,
            past_key_values=None if recompute else past_key_values,
            hidden_states=None if hidden is None else tuple(hidden),
        )

    def _states(self, cache: Cache, frozen: bool) -> list[KeyValueState]:
        if not frozen:
            return [CacheState(cache, layer) for layer in range(len(self.layers))]
        # a new cache may have no layers yet
        held = cache.layers or [FixedPast(None, None)] * len(self.layers)
        return [FixedPast(layer.keys, layer.values) for layer in held]


def _context(
    x: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int, by_span: bool
) -> Context:
    length = x.shape[1]
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"attention_mask must be [rows, tokens], not {mask.dim()}-dimensional")
        if not bool(mask.all()):
            return padded_context(mask, length, position_ids)
    if position_ids is None:
        return plain_context(length, past, x.device)
    if past == 0 and length > 1:
        return packed_context(position_ids.expand(x.shape[0], -1), by_span)
    everything = torch.ones(x.shape[0], past + length, dtype=torch.long, device=x.device)
    ctx = padded_context(everything, length, position_ids)
    if bool((ctx.queries.position[:, -1] == past + length - 1).all()):
        return plain_context(length, past, x.device)
    return ctx


class LlmctlForCausalLM(LlmctlPreTrainedModel, GenerationMixin):
    """Backbone and output head: token ids to logits, or to a loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlmctlConfig) -> None:
        super().__init__(config)
        self.model = LlmctlModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # set by a pass that wraps the head but keeps `weight` all that it computes with
        self.head_reads_as_matrix = False
        # set by a pass that trains some rows of the head alone: the matrix, and indices and values for its rows
        self.head_by_rows: Callable[[], tuple[Tensor, tuple[Tensor, Tensor] | None]] | None = None
        self.post_init()

    def forward(  # noqa: PLR0913  (the names transformers, PEFT and TRL pass)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and with `labels` the loss.

        Args:
            labels: [B, T], aligned with `input_ids` (the shift happens here); -100 is not trained.
            logits_to_keep: only the last n positions, or the positions of an index tensor; 0 is all.
            skip_logits: return the loss alone, without ever holding all logits.
            num_items_in_batch: trained tokens of the whole optimizer step; the summed loss is
                divided by it. Unset: the trained tokens of this batch.
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
        logits = loss = None
        whole = type(self.lm_head) is nn.Linear or self.head_reads_as_matrix
        if labels is not None and skip_logits and whole:
            shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
            head, rows = (self.lm_head.weight, None) if self.head_by_rows is None else self.head_by_rows()
            loss = linear_cross_entropy(hidden.flatten(0, 1), head, shifted.flatten(), rows)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
            if labels is not None:
                loss = F.cross_entropy(
                    logits[:, :-1].float().flatten(0, 1),
                    labels[:, 1:].flatten(),
                    ignore_index=IGNORE,
                    reduction="sum",
                )
        if loss is not None:
            count = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORE).sum()
            loss = loss / count
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def recompute_activations(model: LlmctlForCausalLM) -> None:
    """Keep only block inputs in the forward pass and compute the rest again in the backward pass.

    What `gradient_checkpointing_enable` does, whose name changes between versions of transformers.
    """
    model.model.gradient_checkpointing = True
    model.model._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def compile_blocks(model: LlmctlForCausalLM) -> None:
    """Compile the blocks in place; all layers share one compilation, and names stay as they are.

    Attention then works with a mask: its shapes do not change with the documents of a row, which
    would mean compiling again at every step.
    """
    model.model.attends_by_span = False
    for layer in model.model.layers:
        layer.compile()
