"""The Hugging Face rim: the only file that knows transformers' model classes, caches and outputs.

Inside is the plain `Stack`. Here it gets the signature that transformers' `generate`, PEFT and TRL
call, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)

from llmctl.errors import UserError
from llmctl.files import write_json
from llmctl.kernels.cross_entropy import IGNORE, linear_cross_entropy, slice_tokens
from llmctl.locate import locate
from llmctl.model import families
from llmctl.model.attention import GroupedQueryAttention
from llmctl.model.cache import ForeignState, StateCache
from llmctl.model.config import LlmctlConfig
from llmctl.model.context import context_of
from llmctl.model.experts import Routing
from llmctl.model.init import fill, role_of
from llmctl.model.keymap import Rule, to_disk
from llmctl.model.patterns import PATTERNS
from llmctl.model.stack import Kept, Stack
from llmctl.model.state import FixedPast, State
from llmctl.recipe.experts import SparseExperts
from llmctl.recipe.model import ModelSection


class LlmctlPreTrainedModel(PreTrainedModel):
    """What transformers asks of every class of a family."""

    config_class = LlmctlConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' own convention)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # the kinds of stacks a class can stand on
    stacks: ClassVar[tuple[str, ...]] = ("decoder",)

    def __init__(self, config: LlmctlConfig) -> None:
        if config.spec.stack not in self.stacks:
            raise ValueError(f"{type(self).__name__} does not go with stack: {config.spec.stack}")
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for parameters a checkpoint did not hold, such as a new head."""
        for name, weight in module.named_parameters(recurse=False):
            if not getattr(weight, "_is_hf_initialized", False):
                kind = "norm." if "norm" in type(module).__name__.lower() else "."
                fill(weight, role_of(kind + name), self.config.spec)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` is to let the model make its cache, since a mixer's memory need not be keys and values."""
        return False

    @classmethod
    def from_pretrained(
        cls, where: str | Path, *args: Any, config: LlmctlConfig | None = None, **kwargs: Any
    ) -> Any:
        """transformers' loader, for what only it can do (quantizing on load, device maps).

        Reads any family whose tensors have Llama's names; `checkpoint.load_model` reads them all.

        Raises UserError for the others.
        """
        if config is None:
            folder = locate(str(where), ["*.json", "*.safetensors"])
            config = families.config_in(folder)
            family = families.FAMILIES.get(config.spec.family)
            if family is not None and family.rules(config.spec):
                raise UserError(
                    f"{folder}: transformers' loader cannot reshape the tensors of `{config.spec.family}`",
                    "in Python, llmctl.model.checkpoint.load_model reads them",
                )
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
            state = state_dict if state_dict is not None else self.state_dict()
            # rules name a backbone by its place in a whole model
            place = "model." if self.base_model is self else ""
            state_dict = to_disk(
                {
                    place + name: value
                    for name, value in state.items()
                    if name not in self.all_tied_weights_keys
                },
                rules,
            )
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        path = Path(save_directory) / "config.json"
        if path.is_file():  # an adapter is saved without a config
            write_json(path, fields)

    def disk_form(self) -> tuple[dict[str, Any], tuple[Rule, ...]]:
        """What `config.json` says of this model, and how its tensors are named on disk."""
        name, fields = families.write_config(self.config)
        family = families.FAMILIES.get(name)
        ours = type(self).__name__
        written = family.class_name(ours) if family else ours
        about = {"dtype": str(self.dtype).removeprefix("torch."), "architectures": [written]}
        return fields | about, family.rules(self.config.spec) if family else ()


class LlmctlModel(LlmctlPreTrainedModel, Stack):
    """The backbone: token ids to hidden states."""

    stacks = ("decoder", "encoder")

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
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, [B, T, E]; with experts, their routers' logits too.

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, E].
            attention_mask: [B, S], 1 at real tokens; S counts cached tokens too.
            position_ids: [B, T]. Without cached tokens, positions that restart within a row begin a
                new document, which sees nothing of the ones before it.
            past_key_values: a cache, extended in place; only read, and not returned, where activations
                are recomputed in the backward pass. A cache of transformers' own classes holds keys and
                values, and goes with attention layers only.
            token_type_ids: [B, T] kinds of tokens, for models that tell them apart; 0 when None.
            use_cache: make a cache if none is given. Unset means no.
            kwargs: other libraries' hints, such as `cu_seq_lens_q`; positions already say the same.

        Raises ValueError if not exactly one of ids and embeddings is given, for a mask that is not
        two-dimensional, for a cache in an encoder, and for output_attentions, which no fast path can give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not available: attention weights are never materialised")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        reads_ahead = self.spec.stack == "encoder"
        if reads_ahead and (past_key_values is not None or use_cache):
            raise ValueError("an encoder reads all tokens at once and has no cache")
        if use_cache and past_key_values is None:
            past_key_values = StateCache(self.init_states(len(tokens)))
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        ctx = context_of(tokens, attention_mask, position_ids, past, self.attends_by_span)
        ctx.causality = "none" if reads_ahead else "causal"
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        states = None if past_key_values is None else self._states(past_key_values, frozen=recompute)
        keep = Kept()
        call = self._gradient_checkpointing_func if recompute else None
        out = self.run(self.embed(tokens, ctx, token_type_ids), ctx, states, call, keep)
        shared = {
            "last_hidden_state": out,
            "past_key_values": None if recompute else past_key_values,
            "hidden_states": tuple(keep.hidden) if output_hidden_states else None,
        }
        if not keep.routings:
            return BaseModelOutputWithPast(**shared)
        return RoutedOutput(
            **shared,
            router_logits=tuple(routing.logits for routing in keep.routings),
            routings=tuple(keep.routings),
        )

    def _states(self, cache: Cache, frozen: bool) -> Sequence[State] | None:
        if isinstance(cache, StateCache):
            return cache.frozen() if frozen else cache.states
        for layer, block in enumerate(self.layers):
            if not isinstance(block.self_attn, GroupedQueryAttention):
                kind = self.spec.layer_pattern(layer)
                kind = self.spec.attention if kind in PATTERNS else kind
                raise ValueError(f"the cache holds keys and values, which `{kind}` layers do not keep")
        if not frozen:
            return [ForeignState(cache, layer) for layer in range(len(self.layers))]
        # a new cache may have no layers yet
        return [FixedPast(layer.keys, layer.values) for layer in cache.layers] or None


@dataclass
class RoutedOutput(MoeModelOutputWithPast):
    """What a backbone with experts gives: `routings` says what each layer of them decided."""

    routings: tuple[Routing, ...] | None = None


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

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., E], scaled and capped as the config says."""
        spec = self.model.spec
        logits = self.lm_head(hidden if spec.logits_scaling == 1.0 else hidden / spec.logits_scaling)
        cap = spec.final_logit_softcapping
        return logits if cap is None else (logits / cap).tanh() * cap

    def nats(self, hidden_NE: Tensor, labels_N: Tensor) -> Tensor:
        """Summed negative log-likelihood of the labels that are not -100, never holding all logits at once.

        `hidden_NE` are final hidden states, `labels_N` the token each should predict.
        """
        if self._fuses:
            head, rows = (self.lm_head.weight, None) if self.head_by_rows is None else self.head_by_rows()
            scaling = self.model.spec.logits_scaling
            hidden_NE = hidden_NE if scaling == 1.0 else hidden_NE / scaling
            return linear_cross_entropy(hidden_NE, head, labels_N, rows)
        # the head's matrix alone does not say the logits: they are bent, or made by more than it
        kept = (labels_N != IGNORE).nonzero().squeeze(1)
        total = torch.zeros((), device=hidden_NE.device)
        for at in kept.split(slice_tokens(hidden_NE.device.type)):
            logits = self.head(hidden_NE[at]).float()
            total = total + F.cross_entropy(logits, labels_N[at], reduction="sum")
        return total

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
        """Logits [B, T, V], and with `labels` the loss; with experts, the losses of their routers too.

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
        logits = None
        if labels is None or not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.head(hidden[:, kept])
        loss = None if labels is None else self._loss(out, logits, labels, num_items_in_batch)
        shared = {
            "loss": loss,
            "logits": logits,
            "past_key_values": out.past_key_values,
            "hidden_states": out.hidden_states,
        }
        if not isinstance(out, RoutedOutput):
            return CausalLMOutputWithPast(**shared)
        return MoeCausalLMOutputWithPast(
            **shared, aux_loss=balance_of(out.routings or ()), router_logits=out.router_logits
        )

    @property
    def _fuses(self) -> bool:
        """Whether the loss can be taken from the head's matrix, a slice of the tokens at a time."""
        whole = type(self.lm_head) is nn.Linear or self.head_reads_as_matrix
        return whole and self.model.spec.final_logit_softcapping is None

    def _loss(
        self,
        out: BaseModelOutputWithPast,
        logits: Tensor | None,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        trained = (labels[:, 1:] != IGNORE).sum()
        if logits is None:
            shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
            loss = self.nats(out.last_hidden_state.flatten(0, 1), shifted.flatten())
        else:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE,
                reduction="sum",
            )
        if isinstance(out, RoutedOutput) and out.routings:
            # a mean over this batch's tokens: it counts as much of the step as they do
            loss = loss + trained * router_loss(out.routings, self.model.spec)
        return loss / (num_items_in_batch if num_items_in_batch is not None else trained)


def balance_of(routings: Sequence[Routing]) -> Tensor:
    """The load-balancing loss, unweighted, as a mean over the layers of experts."""
    return torch.stack([routing.balance for routing in routings]).mean()


def router_loss(routings: Sequence[Routing], spec: ModelSection) -> Tensor:
    """The losses of all routers with their weights."""
    experts = spec.experts
    if not isinstance(experts, SparseExperts):
        return torch.zeros((), device=routings[0].balance.device)
    z = torch.stack([routing.z for routing in routings]).mean()
    return experts.router_aux_loss_coef * balance_of(routings) + experts.router_z_loss_coef * z


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
