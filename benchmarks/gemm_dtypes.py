"""Claim: whether bfloat16 products beat float32 ones depends on the CPU, as `train.dtype: auto` knows.

AMX and Arm's BF16 do, and so does AVX512-BF16 on AMD; AVX512-BF16 on Intel without AMX does not.

The matrix products of a training step with `recipes/pretrain-5m.yaml`: for each shape of weight [out, in] the
forward pass y = x Wᵀ and both gradients, in float32 and in bfloat16. Prints GFLOP/s, the ratio of the two
times for a whole step, and what `auto` picks on this CPU:

    python benchmarks/gemm_dtypes.py --rounds 9
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import torch
from timing import compare, options, ratio, report, summary

from llmctl.kernels.cross_entropy import SLICE
from llmctl.kernels.device import DTYPES, has_fast_bfloat16
from llmctl.model import LlmctlConfig, LlmctlForCausalLM, leaves
from llmctl.recipe.load import load_recipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe

RECIPE = "pretrain-5m"
PRECISIONS = ("float32", "bfloat16")


def shapes(vocab_size: int) -> Counter[tuple[int, int, int]]:
    """(tokens, out, in) -> how many linear layers of that shape a step passes through."""
    recipe = load_recipe(PretrainRecipe, RECIPE, {}, [])
    spec = (recipe.model or ModelSection()).resolved(vocab_size=vocab_size)
    tokens = recipe.train.per_device_train_batch_size * (
        recipe.data.max_length or spec.max_position_embeddings
    )
    with torch.device("meta"):
        model = LlmctlForCausalLM(LlmctlConfig.of(spec))
    found: Counter[tuple[int, int, int]] = Counter()
    for leaf in leaves(model):
        # the head meets a slice of the tokens at a time
        seen = min(tokens, SLICE["cpu"]) if leaf.kind == "head" else tokens
        found[(seen, *leaf.shape)] += tokens // seen
    return found


def products(tokens: int, out: int, width: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The three products of a linear layer."""
    x, w = torch.randn(tokens, width).to(dtype), torch.randn(out, width).to(dtype)
    dy = torch.randn(tokens, out).to(dtype)
    linear = torch.nn.functional.linear
    return {"forward": lambda: linear(x, w), "grad x": lambda: dy @ w, "grad w": lambda: dy.T @ x}


def measure(given: argparse.Namespace) -> dict[str, object]:
    """Time every shape; returns rows and the ratio for a whole step."""
    totals = {name: [0.0] * given.rounds for name in PRECISIONS}
    rows: list[dict[str, object]] = []
    for (tokens, out, width), count in shapes(given.vocab_size).items():
        sides = {
            f"{product} {name}": work
            for name in PRECISIONS
            for product, work in products(tokens, out, width, DTYPES[name]).items()
        }
        seconds = compare(sides, given.rounds)
        flops = 2 * tokens * out * width
        for name in PRECISIONS:
            for product in ("forward", "grad x", "grad w"):
                took = seconds[f"{product} {name}"]
                totals[name] = [t + count * s for t, s in zip(totals[name], took, strict=True)]
                speed = summary([flops / s / 1e9 for s in took])
                rows.append({"tokens": tokens, "weight": [out, width], "product": product, "dtype": name,
                             "gflops": speed, "in_a_step": count})  # fmt: skip
                print(f"{tokens:6} x [{out}, {width}]  {product:8} {name:9} {speed['median']:8.0f} GFLOP/s "
                      f"({speed['min']:.0f} – {speed['max']:.0f})", flush=True)  # fmt: skip
    step = ratio(totals["float32"], totals["bfloat16"])
    print(
        f"a step in float32 takes {step['median']:.2f} ({step['min']:.2f} – {step['max']:.2f}) times bfloat16's"
    )
    return {"products": rows, "float32/bfloat16": step}


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--vocab-size", type=int, default=8192)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    result = measure(given)
    picked = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
    print(f"auto picks {picked}")
    report({**vars(given), **result, "auto": picked})


if __name__ == "__main__":
    main()
