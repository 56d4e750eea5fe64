"""Small models with an adapter whose weights are not the zeros it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import add_lora, save_adapter
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.recipe.model import ModelSection

ROWS = 40  # entries of the vocabulary
TOKENS = [3, 7]  # whose rows are trained where a test trains some


def spec(tied: bool = True, **fields: Any) -> ModelSection:
    """Two layers, 16 wide."""
    sizes = {
        "vocab_size": ROWS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return ModelSection(**{**sizes, "tie_word_embeddings": tied, **fields})


def base(folder: Path, tied: bool = True, **fields: Any) -> Path:
    """The folder with a model of random weights in it."""
    save_model(new_model(spec(tied, **fields), seed=0, bos_token_id=1, eos_token_id=2), folder)
    return folder


def adapted(
    where: Path, *, tokens: list[int] | None = None, r: int = 4, alpha: float = 8, **rest: Any
) -> PeftModel:
    """The model in a folder with a random adapter on it, in evaluation mode."""
    settings = {"dropout": 0.0, "target_modules": "all-linear", **rest}
    found = add_lora(load_model(where), r=r, alpha=alpha, tokens=tokens or (), base=str(where), **settings)
    shaken(found)
    return found.eval()


@torch.no_grad()
def shaken(model: PeftModel, seed: int = 1) -> None:
    """Give every trained weight random values that matter."""
    random = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.3)


def saved(model: PeftModel, folder: Path) -> Path:
    """The folder with the adapter in it."""
    folder.mkdir(parents=True)
    save_adapter(model, folder)
    return folder


def ids(rows: int = 3, length: int = 12) -> torch.Tensor:
    """Token ids [rows, length], trained ones among them."""
    found = torch.randint(0, ROWS, (rows, length), generator=torch.Generator().manual_seed(2))
    found[:, 2], found[:, 5] = TOKENS[0], TOKENS[1]
    return found


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    """What a model of ours, of transformers or of PEFT computes, in evaluation mode."""
    return model.eval()(input_ids=ids() if x is None else x).logits


def inner(model: PeftModel) -> LlmctlForCausalLM:
    """The model under an adapter, which computes with it."""
    return model.get_base_model()
