"""Claim, on a CPU: a token through 2 of 8 experts takes at most 1.35 times one layer of the same active FLOPs.

Forward and backward of 4096 tokens of width 512, swiglu:

    experts    8 experts of width 704, 2 of them for each token, with the router and its two losses
    dense      one layer of width 1408: as many products for each token
    all        every expert computed for every token, and weighted by a softmax (kind `dense`)

The router is left at its initial weights, so loads are nearly even. Prints milliseconds and how many times as long
the others take as `dense`. The same for 8 of 64 experts of width 176, of which nothing is claimed: each token is
copied and added 8 times there, and products of 512 tokens are slower than one of all:

    OMP_NUM_THREADS=1 python benchmarks/experts.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import compare, line, options, ratio, report, summary
from torch import Tensor, nn

from llmctl.model.context import plain_context
from llmctl.model.experts import EXPERTS
from llmctl.model.ffn import FFNS
from llmctl.plan.experts import expert_parameters, ffn_parameters
from llmctl.recipe.model import ModelSection

ASKED = 1.35
# experts, of which a token gets, width of one; the claim is about the first
CASES = {"2 of 8": (8, 2, 704), "8 of 64": (64, 8, 176)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def section(kind: str, case: tuple[int, int, int], given: argparse.Namespace) -> ModelSection:
    count, chosen, inner = case
    experts: dict[str, object] = {"kind": kind, "num_experts": count, "moe_intermediate_size": inner}
    if kind == "sparse":
        experts["num_experts_per_tok"] = chosen
    fields = {"hidden_size": given.width, "intermediate_size": chosen * inner, "experts": experts}
    return ModelSection.model_validate({"vocab_size": 32} | fields).resolved()


def pass_of(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def work() -> None:
        call(x).backward()
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return work


def sides(
    case: tuple[int, int, int], dtype: torch.dtype, given: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    x = torch.randn(1, given.tokens, given.width).to(dtype).requires_grad_()
    upstream, ctx = torch.randn(1, given.tokens, given.width).to(dtype), plain_context(given.tokens)
    model, everyone = section("sparse", case, given), section("dense", case, given)
    experts, whole = EXPERTS["sparse"](model).to(dtype), EXPERTS["dense"](everyone).to(dtype)
    assert model.intermediate_size is not None
    one = FFNS[model.ffn](model, model.intermediate_size).to(dtype)
    router = case[0] * given.width
    assert expert_parameters(model)[1] - router == ffn_parameters(model, model.intermediate_size)

    def routed(x: Tensor) -> Tensor:
        y, routing = experts(x, ctx)
        return (y * upstream).sum() + 0.001 * routing.balance + 0.001 * routing.z

    found = {
        "experts": pass_of(experts, routed, x),
        "dense": pass_of(one, lambda x: (one(x) * upstream).sum(), x),
    }
    if given.all:
        found["all"] = pass_of(whole, lambda x: (whole(x, ctx)[0] * upstream).sum(), x)
    return found


def measure(name: str, dtype: str, given: argparse.Namespace) -> dict[str, object]:
    seconds = compare(sides(CASES[name], DTYPES[dtype], given), given.rounds)
    found = {side: summary(values) for side, values in seconds.items()}
    ratios = {f"{side}/dense": ratio(seconds[side], seconds["dense"]) for side in seconds if side != "dense"}
    for side, one in found.items():
        print(line(f"{name}, {dtype}: {side}", one, 1e3, "ms"))
    for side, one in ratios.items():
        print(line(f"{name}, {dtype}: {side}", one))
    if name != next(iter(CASES)):
        return {"seconds": found, "ratios": ratios}
    held = ratios["experts/dense"]["median"] <= ASKED
    print(f"{name}, {dtype}: at most {ASKED:g} times the dense layer: {'yes' if held else 'NO'}", flush=True)
    return {"seconds": found, "ratios": ratios, "held": held}


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512, help="hidden size (default 512)")
    parser.add_argument("--all", action="store_true", help="time the computation of every expert too; slow")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report(
        {**vars(given)}
        | {f"{name}, {dtype}": measure(name, dtype, given) for name in CASES for dtype in DTYPES}
    )


if __name__ == "__main__":
    main()
