"""The model core. Importing it registers `model_type: llmctl` with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from llmctl.model.classify import LlmctlForSequenceClassification
from llmctl.model.config import MODEL_TYPE, LlmctlConfig
from llmctl.model.hf import LlmctlForCausalLM, LlmctlModel, compile_blocks, recompute_activations
from llmctl.model.leaves import Leaf, leaves
from llmctl.model.masked import LlmctlForMaskedLM
from llmctl.model.seq2seq import LlmctlForConditionalGeneration

AutoConfig.register(MODEL_TYPE, LlmctlConfig, exist_ok=True)
AutoModel.register(LlmctlConfig, LlmctlModel, exist_ok=True)
AutoModelForCausalLM.register(LlmctlConfig, LlmctlForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LlmctlConfig, LlmctlForSequenceClassification, exist_ok=True)
AutoModelForMaskedLM.register(LlmctlConfig, LlmctlForMaskedLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(LlmctlConfig, LlmctlForConditionalGeneration, exist_ok=True)

__all__ = [
    "Leaf",
    "LlmctlConfig",
    "LlmctlForCausalLM",
    "LlmctlForConditionalGeneration",
    "LlmctlForMaskedLM",
    "LlmctlForSequenceClassification",
    "LlmctlModel",
    "compile_blocks",
    "leaves",
    "recompute_activations",
]
