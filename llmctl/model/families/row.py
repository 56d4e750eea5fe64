"""What a family is: how another architecture's config and tensors read in our vocabulary, both ways."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from transformers import PreTrainedConfig

from llmctl.model.keymap import Rule
from llmctl.model.rope import ROPE_TYPES, ntk_theta
from llmctl.recipe.model import ModelSection
from llmctl.recipe.rope import RopeNtk

T = TypeVar("T")


class Inexpressible(Exception):
    """A config says something that the other side has no word for; the message names the field."""


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _no_last_word(*_: Any) -> None:
    pass


def _no_rules(spec: ModelSection) -> tuple[Rule, ...]:
    return ()


# our sizes -> the names Llama's config has for them
LLAMA_SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout",
}
SWIGLU: Mapping[str, str] = {"silu": "swiglu", "swish": "swiglu"}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        prefix: how the family's transformers classes begin, as in `LlamaForCausalLM`.
        classes: ends of our classes' names that are other words there.
        sizes: our fields that the config holds under another name, or the same, unchanged.
        fixed: our fields that this architecture has at one value, where it is not our default.
        speaks: our fields that `read` and `write` translate; all others must have their default.
        acts: the config's activation -> our `ffn`, the first for each being what is written.
        act_field: the config's field for it.
        rope: whether `rope_parameters` are translated.
        read: their config -> fields beyond the above; raises Inexpressible.
        write: our spec -> their fields beyond the above; raises Inexpressible.
        rules: how tensors are renamed and reshaped, for a model of such sizes; none where names are Llama's.
        bare: what the names of tensors begin with, where some files leave it out: those of the backbone alone.
        old: ends of tensors' names that some files have -> those that are asked for.
        spare: ends of names of tensors that are passed over by a model that has no place for them.
        stacked_experts: whether the transformers class holds all experts of a layer in two parameters; files do not.
        unadapted: last words of modules that PEFT refuses to adapt in the transformers class.
        finish: (spec, contents of `config.json`) -> None, the last word on them; raises Inexpressible.
    """

    prefix: str
    classes: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=lambda: LLAMA_SIZES)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    speaks: frozenset[str] = frozenset()
    acts: Mapping[str, str] = field(default_factory=lambda: SWIGLU)
    act_field: str = "hidden_act"
    rope: bool = True
    read: Callable[[PreTrainedConfig], dict[str, Any]] = _nothing
    write: Callable[[ModelSection], dict[str, Any]] = _nothing
    rules: Callable[[ModelSection], tuple[Rule, ...]] = _no_rules
    bare: str = "model."
    old: Mapping[str, str] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    stacked_experts: bool = False
    unadapted: tuple[str, ...] = ()
    finish: Callable[[ModelSection, dict[str, Any]], None] = _no_last_word

    def class_name(self, ours: str) -> str:
        """The transformers class that opens what one of our classes holds."""
        end = ours.removeprefix("Llmctl")
        return self.prefix + self.classes.get(end, end)

    def plain_name(self, theirs: str) -> str:
        """The name of one of the family's classes with the end that ours has."""
        ours = next((ours for ours, end in self.classes.items() if theirs.endswith(end)), None)
        return theirs if ours is None else theirs.removesuffix(self.classes[ours]) + ours

    def current_names(self, tensors: Mapping[str, T], needed: Container[str]) -> dict[str, T]:
        """What a file holds by the names that are asked for, without what is spare and not `needed`."""
        found: dict[str, T] = {}
        if self.bare and not any(name.startswith(self.bare) for name in tensors):
            tensors = {self.bare + name: tensor for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            end = None if name in needed else next((end for end in self.old if name.endswith(end)), None)
            today = name if end is None else name.removesuffix(end) + self.old[end]
            if (today in needed or not today.endswith(self.spare)) and (
                today == name or today not in tensors
            ):
                found[today] = tensor
        return found

    def to_ours(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        """Our fields. Raises Inexpressible."""
        fields = {
            ours: getattr(theirs, name)
            for ours, name in self.sizes.items()
            if getattr(theirs, name, None) is not None
        }
        if self.acts:
            act = getattr(theirs, self.act_field)
            if act not in self.acts:
                raise Inexpressible(f"{self.act_field}: {act}")
            fields["ffn"] = self.acts[act]
        if self.rope:
            fields["rope_parameters"] = read_rope(theirs)
        return fields | dict(self.fixed) | self.read(theirs)

    def to_theirs(self, spec: ModelSection) -> dict[str, Any]:
        """The fields of their config. Raises Inexpressible."""
        self._refuse_others(spec)
        fields = {name: getattr(spec, ours) for ours, name in self.sizes.items()}
        if self.acts:
            found = next((act for act, ffn in self.acts.items() if ffn == spec.ffn), None)
            if found is None:
                raise Inexpressible(f"ffn: {spec.ffn}")
            fields[self.act_field] = found
        if self.rope:
            fields["rope_parameters"] = write_rope(spec)
        return fields | self.write(spec)

    def _refuse_others(self, spec: ModelSection) -> None:
        spoken = {"family", "ffn", *self.sizes, *self.speaks, *(("rope_parameters",) if self.rope else ())}
        for name, about in ModelSection.model_fields.items():
            if name in spoken:
                continue
            wanted = self.fixed.get(name, about.get_default(call_default_factory=True))
            if getattr(spec, name) != wanted and name not in DERIVED:
                raise Inexpressible(f"{name}: {_shown(getattr(spec, name))}")


# filled in by `resolved()` from fields that are looked at
DERIVED = frozenset({"head_dim", "num_key_value_heads", "intermediate_size"})


def _shown(value: Any) -> str:
    return str(value.model_dump(exclude_defaults=True)) if isinstance(value, BaseModel) else str(value)


def require(spec: ModelSection, **wanted: Any) -> None:
    """Raise Inexpressible for the first field that has another value."""
    for name, value in wanted.items():
        if getattr(spec, name) != value:
            raise Inexpressible(f"{name}: {getattr(spec, name)}")


def layer_kinds(spec: ModelSection) -> list[str]:
    """The kind of every layer."""
    return [spec.layer_pattern(layer) for layer in range(spec.num_hidden_layers)]


SLIDING = "sliding_attention"


def read_layer_types(config: PreTrainedConfig) -> dict[str, Any]:
    """`pattern` and `sliding_window` of a config with `layer_types`."""
    pattern = ["sliding" if kind == SLIDING else "full" for kind in config.layer_types]
    if "sliding" not in pattern:
        return {}
    return {"sliding_window": config.sliding_window, "pattern": pattern}


def write_layer_types(spec: ModelSection) -> list[str]:
    """`layer_types` of a spec whose layers are full or sliding. Raises Inexpressible."""
    kinds = layer_kinds(spec)
    if other := next((kind for kind in kinds if kind not in ("full", "sliding")), None):
        raise Inexpressible(f"pattern: {other}")
    return [SLIDING if kind == "sliding" else "full_attention" for kind in kinds]


# config key -> kinds of rope that have it
_ROPE_KEYS = {
    "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
_LONGER = ("llama3", "yarn")  # whose config names the context before


def read_rope(theirs: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` of a config. Raises Inexpressible."""
    rope = dict(theirs.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise Inexpressible(f"rope_type: {kind} (supported: {', '.join(ROPE_TYPES)})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Inexpressible(f"partial_rotary_factor: {rope['partial_rotary_factor']}")
    known = {key: value for key, value in rope.items() if key in _ROPE_KEYS and value is not None}
    if kind not in _LONGER:
        known.pop("original_max_position_embeddings", None)
    whole = ("rope_type", "original_max_position_embeddings", "truncate")
    return {key: value if key in whole else float(value) for key, value in known.items()}


def write_rope(spec: ModelSection) -> dict[str, Any]:
    """`rope_parameters` as other programs read them: what NTK does is said by the base alone."""
    rope = spec.rope_parameters
    if isinstance(rope, RopeNtk):
        assert spec.head_dim is not None
        return {"rope_type": "default", "rope_theta": ntk_theta(rope, spec.head_dim)}
    return rope.model_dump(exclude_none=True)
