"""Configs of families against transformers' own: what is said there is said here, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import AutoConfig

from llmctl.errors import UserError, one_of
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import FAMILIES, read_config, write_config
from llmctl.recipe.model import ModelSection
from tests.model.cases import CASES, DEEPSEEK, MAMBA, OTHERS, SMALL

# fields that another one overrules, or that nothing reads
SAID_OTHERWISE = {"head_dim", "max_window_layers", "router_aux_loss_coef", "transformers_version"}


@pytest.mark.parametrize("name", CASES)
def test_what_their_config_says_ours_says(name):
    model_type, settings = CASES[name]
    theirs = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    family, fields = write_config(read_config(theirs.to_diff_dict(), "x"))
    ours = AutoConfig.for_model(**fields)
    assert family == model_type
    for field in {field.name for field in dataclasses.fields(theirs)} - SAID_OTHERWISE:
        found, wanted = getattr(ours, field), getattr(theirs, field)
        if field == "rope_parameters" and wanted:
            found, wanted = ({"truncate": True} | rope for rope in (found, wanted))
        found, wanted = (json.dumps(said, default=str, sort_keys=True) for said in (found, wanted))
        assert found == wanted, field


def test_every_family_has_cases():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES) - OTHERS


def test_a_window_no_layer_uses_is_not_saved_for_all():
    spec = ModelSection(vocab_size=97, num_hidden_layers=1, pattern=["full", "sliding"], sliding_window=4)
    name, fields = write_config(LlmctlConfig.of(spec.model_copy(update={"family": "mistral"})))
    assert name == "mistral" and fields.get("sliding_window") is None
    assert read_config(fields, "x").spec.pattern == ["full"]


REFUSED = {
    "unsupported architecture `falcon`": {"model_type": "falcon"},
    "no model_type": {"hidden_size": 8},
    **{
        message: {"model_type": family, **SMALL, **settings}
        for message, (family, settings) in {
            "hidden_act: gelu": ("llama", {"hidden_act": "gelu"}),
            "rope_type: dynamic (supported: default, linear, ntk, yarn, llama3)": (
                "llama",
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            ),
            "scale_attn_by_inverse_layer_idx: true": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
            "add_cross_attention: true": ("gpt2", {"add_cross_attention": True}),
            "resid_pdrop 0.2 with embd_pdrop 0.1": ("gpt2", {"resid_pdrop": 0.2}),
            "activation_function: silu": ("gpt2", {"activation_function": "silu"}),
            "use_bidirectional_attention: true": ("gemma2", {"use_bidirectional_attention": True}),
            "hidden_activation: gelu": ("gemma2", {"hidden_activation": "gelu"}),
            "rope_type: longrope": (
                "phi3",
                {
                    "rope_parameters": {
                        "rope_type": "longrope",
                        "short_factor": [1.0] * 8,
                        "long_factor": [2.0] * 8,
                    }
                },
            ),
            "partial_rotary_factor: 0.5": ("phi3", {"partial_rotary_factor": 0.5}),
            "resid_pdrop: 0.1": ("phi3", {"resid_pdrop": 0.1}),
            "router_jitter_noise: 0.1": ("mixtral", {"router_jitter_noise": 0.1}),
            "mlp_only_layers [] with decoder_sparse_step 2: only the first layers can be without experts": (
                "qwen3_moe",
                {"decoder_sparse_step": 2, "num_hidden_layers": 4},
            ),
            "mlp_only_layers [1] with decoder_sparse_step 1": ("qwen3_moe", {"mlp_only_layers": [1]}),
            "mlp_only_layers [0, 1, 2] with": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
            "rope_interleave: false": ("deepseek_v3", {**DEEPSEEK, "rope_interleave": False}),
            "num_key_value_heads: 2": ("deepseek_v3", {**DEEPSEEK, "num_key_value_heads": 2}),
            "scoring_func: softmax": ("deepseek_v3", {**DEEPSEEK, "scoring_func": "softmax"}),
            "time_step_limit: [0.1, inf]": (
                "mamba2",
                {**MAMBA, "time_step_limit": [0.1, {"__float__": "Infinity"}]},
            ),
        }.items()
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_configs_we_cannot_express_are_refused(message):
    with pytest.raises(UserError) as caught:
        read_config(dict(REFUSED[message]), "m/config.json")
    assert message in caught.value.message
    assert caught.value.message.startswith("m/config.json: ")


def test_unsupported_architecture_lists_the_supported():
    with pytest.raises(UserError) as caught:
        read_config({"model_type": "gpt_neo"}, "x")
    assert caught.value.hint == f"supported: {one_of([*FAMILIES, 'llmctl'])}"


SPARSE = {"kind": "sparse", "num_experts": 4}
DEEP = {
    "attention": "mla",
    "experts": SPARSE | {"scoring_func": "sigmoid", "correction_bias": True, "n_shared_experts": 1},
}
GPT = {"norm": "layernorm", "position": "learned", "ffn": "gelu", "attention_bias": "all", "mlp_bias": True}
GEMMA2 = {"norm": "rmsnorm1p", "norm_placement": "sandwich", "ffn": "geglu", "embedding_multiplier": 16.0}
MAMBA2 = {"pattern": ["mamba2"], "position": "none", "ffn": "none"}
WINDOWS = {"pattern": ["full", "sliding"], "sliding_window": 8}
# family, what of it has no word there -> fields of a model that would be expressed without it
UNSAID = {
    ("llama", "qk_norm: True"): {"qk_norm": True},
    ("llama", "experts: {'num_experts': 4, 'kind': 'sparse'}"): {"experts": SPARSE},
    ("gpt2", "num_key_value_heads: 2"): GPT | {"num_key_value_heads": 2},
    ("gpt2", "head_dim: 32"): GPT | {"head_dim": 32},
    ("gpt2", "query_pre_attn_scalar: 2.0"): GPT | {"query_pre_attn_scalar": 2.0},
    ("gpt2", "mlp_bias: False"): GPT | {"mlp_bias": False},
    ("gemma2", "embedding_multiplier: 1.0, not √hidden_size"): GEMMA2 | {"embedding_multiplier": 1.0},
    ("gemma2", "query_pre_attn_scalar: 2.5, not a whole number"): GEMMA2 | {"query_pre_attn_scalar": 2.5},
    ("gemma2", "norm_placement: pre"): GEMMA2 | {"norm_placement": "pre"},
    ("phi3", "head_dim: 32"): {"head_dim": 32},
    ("phi3", "rope_type: linear"): {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ("phi3", "pattern: ['full', 'sliding']"): WINDOWS,
    ("mixtral", "experts: None"): {},
    ("mixtral", "experts: dense"): {"experts": {"kind": "dense"}},
    ("mixtral", "experts.norm_topk_prob: False"): {"experts": SPARSE | {"norm_topk_prob": False}},
    ("mixtral", "experts.first_k_dense_replace: 1"): {"experts": SPARSE | {"first_k_dense_replace": 1}},
    ("mixtral", "experts.noisy: True"): {"experts": SPARSE | {"noisy": True}},
    ("qwen3_moe", "qk_norm: False"): {"experts": SPARSE},
    ("qwen3_moe", "experts.n_shared_experts: 1"): {
        "qk_norm": True,
        "experts": SPARSE | {"n_shared_experts": 1},
    },
    ("qwen3_moe", "pattern: ['full', 'sliding']"): {"qk_norm": True, "experts": SPARSE, **WINDOWS},
    ("deepseek_v3", "experts: None"): {"attention": "mla"},
    ("deepseek_v3", "experts.scoring_func: softmax"): DEEP | {"experts": SPARSE | {"n_shared_experts": 1}},
    ("deepseek_v3", "experts.n_shared_experts: 0"): DEEP
    | {"experts": SPARSE | {"scoring_func": "sigmoid", "correction_bias": True}},
    ("mamba2", "ffn: swiglu"): MAMBA2 | {"ffn": "swiglu"},
}


@pytest.mark.parametrize("family, said", UNSAID)
def test_a_named_family_that_cannot_express_the_model_is_an_error(family, said):
    fields = UNSAID[family, said] | {"family": family, "vocab_size": 97}
    with pytest.raises(UserError) as caught:
        write_config(LlmctlConfig.of(ModelSection(**fields)))
    assert caught.value.message.startswith(f"model.family: `{family}` cannot express {said}")
    name, _ = write_config(LlmctlConfig.of(ModelSection(**fields | {"family": "auto"})))
    assert name != family


def test_a_config_without_a_context_has_the_one_it_was_trained_on():
    """Mamba-2's has none, and training cuts rows to the model's context where a recipe names no length."""
    assert (
        read_config({"model_type": "mamba2", **MAMBA, "hidden_size": 64}, "x").spec.max_position_embeddings
        == 2048
    )


def test_router_losses_count_where_transformers_would_add_them():
    settings = {"model_type": "mixtral", **SMALL, "router_aux_loss_coef": 0.02}
    for said, coefficient in ((False, 0.0), (True, 0.02)):
        experts = read_config(settings | {"output_router_logits": said}, "x").spec.experts
        assert experts.router_aux_loss_coef == coefficient
