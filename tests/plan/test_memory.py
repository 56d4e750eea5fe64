"""The memory that a plan foretells, against sums over a model that stands, and against runs that were measured."""

from __future__ import annotations

import pytest

from llmctl.plan.memory import LIBRARIES, adapter_training_bytes, training_bytes
from llmctl.recipe.model import ModelSection

# Qwen3-0.6B: a vocabulary so large that table, head and logits count as much as the blocks
QWEN3 = ModelSection(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    qk_norm=True,
    family="qwen3",
).resolved()
WHOLE, TABLE, TRAINED = 596_049_920, 151_936 * 1024, 10_092_544  # LoRA of rank 16 on all matrices


def planned(
    rows: int, compute_bytes: int, matrix_bytes: float | None = None, on_cpu: bool = True
) -> dict[str, int]:
    """The plan of LoRA on rows of 512 tokens; logits exist of 256 tokens at once."""
    whole = training_bytes(QWEN3, rows, 512, compute_bytes, False, 256)
    return adapter_training_bytes(
        QWEN3,
        whole,
        trained=TRAINED,
        matrix_bytes=matrix_bytes or compute_bytes,
        compute_bytes=compute_bytes,
        trained_rows=False,
        on_cpu=on_cpu,
    )


# three runs of `llmctl sft --lora` on such a model: the largest resident size, in GiB
@pytest.mark.parametrize(
    ("rows", "compute_bytes", "measured"), [(1, 4, 5.15), (4, 4, 9.63), (1, 2, 4.01)], ids=str
)
def test_a_large_vocabulary_is_foretold(rows: int, compute_bytes: int, measured: float) -> None:
    assert sum(planned(rows, compute_bytes).values()) / 2**30 == pytest.approx(measured, rel=0.06)


def test_only_the_matrices_inside_are_narrowed() -> None:
    found = planned(1, 2)
    assert found["weights"] == pytest.approx(2 * (WHOLE - TABLE) + 4 * TABLE + 4 * TRAINED, rel=1e-3)
    # of the head there is a copy beside its logits
    assert found["logits"] == 256 * 151_936 * (4 + 4 + 2) + 2 * TABLE
    assert planned(1, 4)["logits"] == 256 * 151_936 * (4 + 4 + 4)


def test_opening_a_base_for_four_bits_is_the_peak() -> None:
    """Every weight is there in float32 before it is rounded; on a GPU that is in the memory of the host."""
    small = planned(1, 2, matrix_bytes=0.5)
    assert small["opening"] == 0  # the activations of 512 tokens are more
    model = QWEN3.model_copy(update={"num_hidden_layers": 280})
    whole = training_bytes(model, 1, 64, 2, False, 256)
    parts = {"trained": TRAINED, "matrix_bytes": 0.5, "compute_bytes": 2, "trained_rows": False}
    large = adapter_training_bytes(model, whole, **parts, on_cpu=True)
    weights = 4 * (10 * (WHOLE - TABLE) + TABLE + TRAINED)
    assert sum(large.values()) == pytest.approx(weights + LIBRARIES, rel=1e-3)
    assert large["opening"] > large["weights"]
    assert adapter_training_bytes(model, whole, **parts, on_cpu=False)["opening"] == 0
