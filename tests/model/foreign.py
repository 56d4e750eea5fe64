"""Adapters that PEFT made on transformers' own classes, and what PEFT computes with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tests.model.cases import CASES, SMALL, ids, theirs

# family -> its case; experts only in some layers, biases and grouped heads are among them
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral-window",
    "qwen2": "qwen2",
    "qwen3": "qwen3-window-biases",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gpt2": "gpt2",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3-moe-dense-first",
    "deepseek_v3": "deepseek-v3",
    "deepseek_v3-plain": "deepseek-v3-yarn-biases",
    "mamba2": "mamba2",
}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3-plain")
TRAINED = [5, 9]  # tokens whose rows are trained where a kind trains some
MORE = SMALL["vocab_size"] + 2  # entries where a kind adds two
_ATTENTION = {
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "mamba2": ["in_proj"],  # PEFT refuses the others
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"],
    "deepseek_v3-plain": ["q_proj", "kv_a_proj_with_mqa"],
}
_TABLES = {"gpt2": "wte", "mamba2": "embeddings"}


def some(family: str) -> list[str]:
    """Layers of a family, by the last word of their names."""
    return _ATTENTION.get(family, ["q_proj", "v_proj"])


def table(family: str) -> str:
    return _TABLES.get(family, "embed_tokens")


def every(family: str) -> Any:
    return some(family) if family == "mamba2" else "all-linear"


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: fields of PEFT's config for a family, and the entries its base is resized to."""

    fields: Callable[[str], dict[str, Any]]
    rows: int | None = None


def _of(rows: int | None = None, **fields: Any) -> Kind:
    return Kind(lambda family: {"target_modules": some(family), **fields}, rows)


def _tables(embedding: bool, head: bool, **fields: Any) -> Kind:
    return Kind(
        lambda f: {"target_modules": [*some(f), *[table(f)] * embedding, *["lm_head"] * head], **fields}
    )


def _whole(embedding: bool, head: bool, rows: int | None = None, **fields: Any) -> Kind:
    return Kind(
        lambda f: {
            "target_modules": some(f),
            "modules_to_save": [*[table(f)] * embedding, *["lm_head"] * head],
            **fields,
        },
        rows,
    )


def _rows(embedding: list[int] | None, head: list[int]) -> Kind:
    def fields(family: str) -> dict[str, Any]:
        named = {"lm_head": head} | ({table(family): embedding} if embedding else {})
        return {"target_modules": some(family), "trainable_token_indices": named}

    return Kind(fields)


KINDS: dict[str, Kind] = {
    "all-linear": Kind(lambda f: {"target_modules": every(f)}),
    "regex": Kind(
        lambda f: {"target_modules": rf".*\.[12]\.(self_attn|attn|mixer)\..*({'|'.join(some(f))})"}
    ),
    "layers": _of(layers_to_transform=[1]),
    "exclude": _of(exclude_modules=r".*\.(layers|h)\.0\..*"),
    "patterns": Kind(
        lambda f: {
            "target_modules": every(f),
            "rank_pattern": {some(f)[0]: 5, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {some(f)[0]: 7},
        }
    ),
    "rslora": _of(use_rslora=True),
    "dora": _of(use_dora=True),
    "bias-all": _of(bias="all"),
    "bias-lora": _of(bias="lora_only"),
    "embedding": _tables(True, False),
    "head": _tables(False, True),
    "both": _tables(True, True),
    "both-tied": _tables(True, False, ensure_weight_tying=True),
    "dora-embedding": _tables(True, False, use_dora=True),
    "whole-embedding": _whole(True, False),
    "whole-head": _whole(False, True),
    "whole-both": _whole(True, True),
    "whole-tied": _whole(True, False, ensure_weight_tying=True),
    "rows": _of(trainable_token_indices=TRAINED),
    "rows-both": _rows(TRAINED, TRAINED),
    "rows-apart": _rows(TRAINED, [7]),
    "rows-head": _rows(None, [7]),
    "grown-whole": _whole(True, True, MORE),
    "grown-embedding": _whole(True, False, MORE),
    "grown-rows": _of(MORE, trainable_token_indices=[MORE - 2, MORE - 1]),
    "shrunk": _of(SMALL["vocab_size"] - 7),
    "experts": Kind(
        lambda f: {
            "target_modules": some(f)[:1],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        }
    ),
    "experts-down": Kind(lambda f: {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
}


def base(folder: Path, family: str, tied: bool) -> Path:
    """The folder with a transformers model of a family, made once."""
    out = folder / f"{family}-{'tied' if tied else 'own'}"
    if not out.is_dir():
        model_type, settings = CASES[FAMILIES[family]]
        CASES["foreign"] = (model_type, {**settings, "tie_word_embeddings": tied})
        theirs("foreign", None if family == "mamba2" else 1.5).save_pretrained(out)
        del CASES["foreign"]
    return out


def opened(where: Path, rows: int | None = None) -> nn.Module:
    """transformers' model, resized as PEFT's users do."""
    model = AutoModelForCausalLM.from_pretrained(where)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def adapter(out: Path, where: Path, family: str, kind: str) -> Path:
    """The folder with a random adapter of a kind for the model in `where`, as PEFT saves it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **KINDS[kind].fields(family))
        model = get_peft_model(opened(where, KINDS[kind].rows), config)
        _shake(model)
        model.save_pretrained(out)
    return out


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Give what is trained values that matter."""
    random = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" in name:
            weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=random))
        elif weight.requires_grad:
            scale = 0.05 if "tokens_delta" in name else 0.15
            weight.add_(torch.randn(weight.shape, generator=random) * scale)


def by_peft(where: Path, folder: Path, rows: int | None = None) -> nn.Module:
    """What PEFT makes of an adapter on transformers' model."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(opened(where, rows), folder).eval()


def tokens(rows: int | None) -> torch.Tensor:
    """Ids [2, 20], trained and new ones among them."""
    x = ids(2, 20) % (rows if rows and rows < SMALL["vocab_size"] else SMALL["vocab_size"])
    x[0, 3], x[1, 7], x[0, 8] = 5, 9, 7
    if rows and rows > SMALL["vocab_size"]:
        x[0, 5], x[1, 2] = rows - 2, rows - 1
    return x
