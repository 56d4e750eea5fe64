"""The core's config at the Hugging Face rim: a `ModelSection` that transformers can hold."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from llmctl.recipe.model import ModelSection

MODEL_TYPE = "llmctl"


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
        # Our patterns mask by position, so a cache must keep every key: transformers' sliding cache would not.
        self.layer_types = ["full_attention"] * spec.num_hidden_layers
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> ModelSection:
        """The architecture, resolved: every size is filled in."""
        return ModelSection.model_validate({name: getattr(self, name) for name in ModelSection.model_fields})

    @classmethod
    def of(cls, spec: ModelSection, **rest: Any) -> LlmctlConfig:
        """The config of an architecture; `rest` are transformers' own fields, such as eos_token_id."""
        return cls(**spec.model_dump(), **rest)
