"""Models with random weights, made where they are used, and the same ones as transformers has them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmctl.data.batches import Batches, Laid
from llmctl.data.packing import cut, pack
from llmctl.model import LlmctlConfig, LlmctlForCausalLM
from llmctl.model.families import write_config
from llmctl.plan.size import flops_per_token
from llmctl.recipe.load import load_recipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe

VOCABULARY = 50_304  # GPT-2's, to a multiple of 128
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
SHAPES = {
    "350M": {
        "vocab_size": VOCABULARY,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "max_position_embeddings": 1024,
    },
    # Llama 3.2 1B with a vocabulary of 32,000
    "1B": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
    },
}


def shape(name: str, tiny: bool) -> ModelSection:
    """The architecture of that size, resolved; 124M is that of recipes/pretrain-124m.yaml."""
    if tiny:
        return ModelSection.model_validate(TINY).resolved()
    if name == "124M":
        recipe = load_recipe(PretrainRecipe, "pretrain-124m", {}, [])
        assert recipe.model is not None
        return recipe.model.resolved(vocab_size=VOCABULARY)
    return ModelSection.model_validate(SHAPES[name]).resolved()


@torch.no_grad()
def random_llama(
    spec: ModelSection, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlmctlForCausalLM:
    """A model of a llama shape, filled on its device, which takes no time on a GPU."""
    config = LlmctlConfig.of(spec)
    with torch.device("meta"):
        model = LlmctlForCausalLM(config)
    # cast before there is any memory: a model in float32 would be twice as large for a moment
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(1.0)
    return model


@torch.no_grad()
def transformers_twin(model: LlmctlForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama with the same weights, on the same device, in the same precision."""
    name, fields = write_config(model.config)
    assert name == "llama", name
    weight = model.lm_head.weight
    # made in its precision: a cast afterwards would round the frequencies of its rotation too
    with torch.device(weight.device):
        twin = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=weight.dtype)
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def training_flops(spec: ModelSection, length: int) -> int:
    """FLOPs that a token of a row of one document costs in training: 6 N + 6 L H D (T + 1).

    N counts the weights of all matrix products, the head's among them and the embedding table's not; L layers,
    H heads of D channels, T tokens in the row, of which a query sees half on average.
    """
    return 3 * flops_per_token(spec, length)


def random_ids(spec: ModelSection, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """[rows, length] on the CPU."""
    assert spec.vocab_size is not None
    return torch.randint(3, spec.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed_batches(spec: ModelSection, rows: int, length: int, steps: int, median: int = 350) -> Batches:
    """At least `steps` steps of rows in which random documents are packed, of log-normal lengths."""
    assert spec.vocab_size is not None
    random = np.random.default_rng(0)
    count = 2 + 2 * rows * length * steps // median
    lengths = np.clip(random.lognormal(np.log(median), 1.0, count), 4, 8 * length).astype(np.int64)
    ids = random.integers(3, spec.vocab_size, int(lengths.sum()), dtype=np.int64).astype(np.uint16)
    pieces = cut(np.concatenate([[0], np.cumsum(lengths)]), length, "split")
    laid = Laid(ids, pieces, pack(pieces.length, length))
    return Batches(laid, max_length=length, batch_size=rows, accumulation=1, seed=0, pad_id=0)
