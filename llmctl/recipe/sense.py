"""What of an architecture does not go together, and what nothing would read. No torch.

Each function yields complaints about one side of a `model.*` section; the first is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llmctl.errors import one_of
from llmctl.recipe.experts import SparseExperts, looks_ahead
from llmctl.recipe.mixers import LshSection, MlaSection, RoutingSection, SsmSection

# a ModelSection, whose module imports this one
ModelSection = Any

# what a kind of layer cannot do without; a mixer's section has defaults and may be left out
SIZES: dict[str, tuple[str, ...]] = {
    "full": (),
    "sliding": ("sliding_window",),
    "band": ("sliding_window",),
    "dilated": ("sliding_window", "dilation"),
    "global": ("num_global_tokens",),
    "random": ("num_random_blocks", "block_size"),
    "block": ("block_size",),
    "routing": (),
    "lsh": (),
    "mamba2": (),
}
SECTIONS = {"routing": RoutingSection, "lsh": LshSection, "mamba2": SsmSection}
SECTION_OF = {"routing": "routing", "lsh": "lsh", "mamba2": "ssm"}
# fields of attention, which a model of state-space layers alone does not have
OF_ATTENTION = (
    "qk_norm", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_dropout", "attention_bias",
    "rope_parameters",
)  # fmt: skip


def mistakes(model: ModelSection) -> Iterator[str]:
    """All complaints, in the order in which they are worth telling."""
    for look in LOOKS:
        yield from look(model)


def kinds_of(model: ModelSection) -> set[str]:
    """The kinds of layers there are, unions taken apart."""
    return {part for entry in model.pattern for part in entry.split("+")}


def _heads(model: ModelSection) -> Iterator[str]:
    heads, groups = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if heads % groups:
        yield f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
    if model.attention == "mla":
        return
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            f"hidden_size ({model.hidden_size}) is not a multiple of num_attention_heads ({heads}); "
            "set head_dim to choose a width"
        )
    width = model.head_dim or model.hidden_size // heads
    if model.position == "rope" and width % 2:
        yield f"head_dim ({width}) is odd: rotary positions turn pairs of channels"


def _layers(model: ModelSection) -> Iterator[str]:
    kinds = kinds_of(model)
    needed = {size for kind in kinds for size in SIZES[kind]}
    for kind in sorted(kinds):
        for size in SIZES[kind]:
            if getattr(model, size) is None:
                yield f"pattern has `{kind}` layers but {size} is unset"
    for size in sorted({size for sizes in SIZES.values() for size in sizes} - needed):
        if getattr(model, size) is not None:
            users = one_of([kind for kind, sizes in SIZES.items() if size in sizes])
            yield f"{size} is set but no layer of pattern is {users}"
    for kind, section in SECTION_OF.items():
        if getattr(model, section) is not None and kind not in kinds:
            yield f"{section} is set but no layer of pattern is `{kind}`"


def _stacks(model: ModelSection) -> Iterator[str]:
    if model.stack != "decoder" and "mamba2" in model.pattern:
        yield f"`mamba2` layers read from left to right, which stack: {model.stack} does not"
    if model.stack != "decoder" and "sliding" in kinds_of(model):
        yield f"`sliding` has no bound ahead, where stack: {model.stack} looks too; `band` has one to either side"
    if model.num_decoder_layers is not None and model.stack != "encoder_decoder":
        yield f"num_decoder_layers is set but stack is `{model.stack}`"


def _feed_forward(model: ModelSection) -> Iterator[str]:
    experts = model.experts
    if model.ffn == "none" and set(model.pattern) != {"mamba2"}:
        yield "ffn: none goes with `mamba2` layers only"
    if experts is None:
        return
    if model.stack != "encoder" and (why := looks_ahead(experts)) is not None:
        yield f"experts of kind `{experts.kind}` look ahead ({why}): they go with stack: encoder only"
    if model.ffn == "none":
        yield "experts are feed-forward layers, but ffn is `none`"
    if experts.first_k_dense_replace >= model.num_hidden_layers:
        yield (
            f"experts.first_k_dense_replace ({experts.first_k_dense_replace}) leaves none of the "
            f"{model.num_hidden_layers} layers to experts"
        )
    if isinstance(experts, SparseExperts):
        yield from _routers(experts)


def _routers(experts: SparseExperts) -> Iterator[str]:
    taken, count, groups = experts.num_experts_per_tok, experts.num_experts, experts.n_group
    if taken > count:
        yield f"experts.num_experts_per_tok ({taken}) is more than num_experts ({count})"
    if count % groups:
        yield f"experts.num_experts ({count}) is not a multiple of n_group ({groups})"
    if experts.topk_group > groups:
        yield f"experts.topk_group ({experts.topk_group}) is more than n_group ({groups})"
    within = experts.topk_group * (count // groups)
    if taken > within:
        yield (
            f"experts.num_experts_per_tok ({taken}) is more than the {within} experts that topk_group "
            f"({experts.topk_group}) of n_group ({groups}) groups hold"
        )
    if "bias_update_rate" in experts.model_fields_set and not experts.correction_bias:
        rate = type(experts).model_fields["bias_update_rate"].default
        if experts.bias_update_rate != rate:
            yield "experts.bias_update_rate is set but correction_bias is false"


def _states(model: ModelSection) -> Iterator[str]:
    ssm = model.ssm
    if ssm is None:
        return
    inner = ssm.expand * model.hidden_size
    if inner % ssm.head_dim:
        yield f"ssm: expand x hidden_size ({inner}) is not a multiple of head_dim ({ssm.head_dim})"
    heads = inner // ssm.head_dim
    if heads % ssm.n_groups:
        yield f"ssm: its {heads} heads are not a multiple of n_groups ({ssm.n_groups})"


def _latent(model: ModelSection) -> Iterator[str]:
    if model.attention != "mla":
        if model.mla is not None:
            yield "mla is set but attention is not `mla`"
        return
    if kinds_of(model) <= set(SECTIONS):
        yield f"attention is `mla`, but no layer of pattern has it: {one_of(sorted(kinds_of(model)))}"
    if model.position != "rope":
        yield f"attention: mla turns part of each key, so position must be rope, not {model.position}"
    width = (model.mla or MlaSection()).qk_rope_head_dim
    if width % 2:
        yield f"mla.qk_rope_head_dim ({width}) is odd: rotary positions turn pairs"
    if model.num_key_value_heads not in (None, model.num_attention_heads):
        yield "attention: mla has no groups of keys; leave num_key_value_heads unset"
    if model.qk_norm:
        yield "attention: mla normalises what it compresses, not queries and keys; drop qk_norm"
    if model.head_dim not in (None, width):
        yield "attention: mla has widths of its own; set those of mla instead of head_dim"


def _content(model: ModelSection) -> Iterator[str]:
    for kind in sorted({"routing", "lsh"} & set(model.pattern)):
        if model.position in ("relative", "alibi"):
            yield f"`{kind}` layers take no score bias, but position is `{model.position}`"
        if model.attn_logit_softcapping is not None:
            yield f"`{kind}` layers do not bend scores, but attn_logit_softcapping is set"
        if model.attention_dropout:
            yield f"`{kind}` layers drop no weights, but attention_dropout is set"


def _positions(model: ModelSection) -> Iterator[str]:
    defaults = type(model).model_fields
    if model.position in ("relative", "alibi") and set(model.pattern) == {"mamba2"}:
        yield f"position: {model.position} adds to scores, but `mamba2` layers have none"
    if model.position_offset and model.position != "learned":
        yield f"position_offset is set but position is `{model.position}`, not `learned`"
    if model.rope_parameters != defaults["rope_parameters"].default and model.position != "rope":
        yield f"rope_parameters are set but position is `{model.position}`, not `rope`"
    for name in ("relative_attention_num_buckets", "relative_attention_max_distance"):
        if getattr(model, name) != defaults[name].default and model.position != "relative":
            yield f"{name} is set but position is `{model.position}`, not `relative`"


def _scores(model: ModelSection) -> Iterator[str]:
    if set(model.pattern) == {"mamba2"}:
        for name in OF_ATTENTION:
            if getattr(model, name) != type(model).model_fields[name].default:
                yield f"{name} is set but `mamba2` layers do not attend"


LOOKS: tuple[Callable[[ModelSection], Iterator[str]], ...] = (
    _heads,
    _layers,
    _stacks,
    _feed_forward,
    _states,
    _latent,
    _content,
    _positions,
    _scores,
)
