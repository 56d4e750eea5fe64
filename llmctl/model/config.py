"""The core's config at the Hugging Face rim: a `ModelSection` that transformers can hold."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from llmctl.recipe.experts import SparseExperts
from llmctl.recipe.model import ModelSection

MODEL_TYPE = "llmctl"


@strict  # which has transformers ask `validate_rope`
class LlmctlConfig(PreTrainedConfig):
    """All fields of `recipe/model.py` as attributes, plus what every transformers config has.

    The fields, their defaults and their checks are those of `ModelSection`; none is repeated here.
    `spec` gives them back as one checked object. Raises pydantic's ValidationError on bad fields.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own convention)

    def __post_init__(self, **kwargs: Any) -> None:
        fields = {name: kwargs.pop(name) for name in ModelSection.model_fields if name in kwargs}
        # transformers gives every config a `tie_word_embeddings`; the section's default is the one that counts
        spec = ModelSection.model_validate(fields).resolved()
        for name, value in spec.model_dump().items():
            setattr(self, name, value)
        told = _told(spec)
        for name, value in told.items():
            setattr(self, name, value)
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in told})

    def validate_rope(self) -> None:
        """Nothing: the section has checked the rotation; transformers would ask for an even head where none is turned."""

    @property
    def spec(self) -> ModelSection:
        """The architecture, resolved: every size is filled in."""
        return ModelSection.model_validate({name: getattr(self, name) for name in ModelSection.model_fields})

    @classmethod
    def of(cls, spec: ModelSection, **rest: Any) -> LlmctlConfig:
        """The config of an architecture; `rest` are transformers' own fields, such as eos_token_id."""
        return cls(**spec.model_dump(), **rest)


def _told(spec: ModelSection) -> dict[str, Any]:
    """What transformers and TRL ask a config for under names of their own; each follows from the fields."""
    told: dict[str, Any] = {
        # Our patterns mask by position, so a cache must keep every key: transformers' sliding cache would not.
        "layer_types": ["full_attention"] * spec.num_hidden_layers,
        "is_encoder_decoder": spec.stack == "encoder_decoder",
    }
    if isinstance(spec.experts, SparseExperts):
        told |= {
            "num_experts": spec.experts.num_experts,
            "num_experts_per_tok": spec.experts.num_experts_per_tok,
            "router_aux_loss_coef": spec.experts.router_aux_loss_coef,
            "output_router_logits": spec.experts.router_aux_loss_coef > 0,
        }
    return told
