"""Tiny transformers models of every family, with the settings that are easy to get wrong."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
GEMMA = {
    "hidden_size": 60,
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 12,
    "v_head_dim": 14,
    "num_nextn_predict_layers": 0,
}
MAMBA = {
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 12,
    "n_groups": 1,
    "chunk_size": 8,
    "tie_word_embeddings": False,
}
# tested in a file of their own
OTHERS = frozenset({"bert", "roberta", "t5"})

# name -> (model_type, settings beyond SMALL)
CASES = {
    "llama": ("llama", {}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-mqa-biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-window-biases": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-narrow-untied-unscaled": (
        "gpt2",
        {
            "n_inner": 100,
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "activation_function": "gelu",
            "hidden_size": 60,
        },
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-full-uncapped-biases": (
        "gemma2",
        {
            "head_dim": 18,
            "query_pre_attn_scalar": 40,
            "layer_types": ["full_attention"] * 3,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 8}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-dense-first": (
        "qwen3_moe",
        {
            **EXPERTS,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
    "deepseek-v3": ("deepseek_v3", DEEPSEEK),
    "deepseek-v3-yarn-biases": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "attention_bias": True,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "mamba2": ("mamba2", MAMBA),
    "mamba2-groups-tied": (
        "mamba2",
        {**MAMBA, "n_groups": 2, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", {}),
    "phi3-window-tied": (
        "phi3",
        {"sliding_window": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}


def theirs(name: str, scale: float | None = None) -> torch.nn.Module:
    """A transformers model of a case with random weights, biases and norms, all `scale` times as large.

    Unset, logits reach 5 to 6. (Rates of forgetting are exponentials of weights: those stay as they are.)
    """
    model_type, settings = CASES[name]
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    scale = scale or (1.0 if model_type == "mamba2" else 3.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            weight.mul_(scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length] without special tokens."""
    return torch.randint(
        3, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed)
    )
