"""Memory and disk of a training run, estimated before it starts."""

from __future__ import annotations

from llmctl.plan.size import parameters, total_parameters
from llmctl.recipe.model import ModelSection

WEIGHT = GRADIENT = 4  # bytes, float32
MOMENTS = 8  # AdamW's two, float32
LIBRARIES = 450 << 20  # resident size of torch and transformers after import


def training_bytes(
    model: ModelSection, rows: int, length: int, compute_bytes: int, checkpointing: bool, head_tokens: int
) -> dict[str, int]:
    """Peak bytes by part of one micro-batch of `rows` x `length` tokens; `model` must be resolved.

    `head_tokens` are the tokens whose logits exist at once (`kernels.cross_entropy.slice_tokens`).

    Activations count what autograd keeps per token and block: block inputs and norm outputs in
    float32, the inputs of every product and the attention's operands. Good to about a quarter.
    """
    weights = total_parameters(model)
    assert model.vocab_size and model.intermediate_size and model.head_dim and model.num_key_value_heads
    width, inner, tokens = model.hidden_size, model.intermediate_size, rows * length
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    kept = 4 * 4 * width + compute_bytes * (2 * width + heads + 4 * inner) + 4 * 2 * heads
    layers = 1 if checkpointing else model.num_hidden_layers
    activations = tokens * (layers * kept + 4 * width * (model.num_hidden_layers + 2))
    logits = min(tokens, head_tokens) * model.vocab_size * (4 + 4 + compute_bytes)
    return {
        "weights": weights * (WEIGHT + (compute_bytes if compute_bytes != WEIGHT else 0)),
        "gradients": weights * GRADIENT,
        "optimizer": weights * MOMENTS,
        "activations": activations,
        "logits": logits,
        "libraries": LIBRARIES,
    }


def adapter_training_bytes(
    model: ModelSection,
    whole: dict[str, int],
    *,
    trained: int,
    matrix_bytes: float,
    compute_bytes: int,
    trained_rows: bool,
    on_cpu: bool,
) -> dict[str, int]:
    """Peak bytes by part when an adapter is trained on a frozen model.

    Opening is what reading the base needs beyond all other parts: it is read in float32 before its matrices are
    narrowed, in the memory of the host. For a short row that is the peak.

    Args:
        whole: `training_bytes` of the same micro-batch.
        trained: parameters of the adapter.
        matrix_bytes: bytes a weight of the frozen matrices inside the blocks; tables, norms and the head stay float32.
        trained_rows: some rows of the head are trained, in a copy of it.
    """
    sizes = parameters(model)
    matrices = sizes["attention"] + sizes["ffn"]
    rest = sum(sizes.values()) - matrices
    # the loss multiplies by the head in the precision of the products
    head = model.vocab_size or 0
    copied = head * model.hidden_size * compute_bytes if compute_bytes != WEIGHT or trained_rows else 0
    found = whole | {
        "weights": round(matrices * matrix_bytes) + rest * WEIGHT + trained * WEIGHT,
        "gradients": trained * GRADIENT,
        "optimizer": trained * MOMENTS,
        "logits": whole["logits"] + copied,
    }
    opened = (sum(sizes.values()) + trained) * WEIGHT + whole["libraries"]
    return found | {"opening": max(0, opened - sum(found.values())) if on_cpu else 0}
