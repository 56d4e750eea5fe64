"""Claim, on a CPU: llmctl decodes faster than transformers' `generate` in bfloat16, most of all in int8 and int4.

One sequence, greedy, a Llama of 222 M random parameters (16 layers of 1,024, 32,000 tokens, tied), as
`llmctl chat` would run it:

    transformers  LlamaForCausalLM in bfloat16, `generate` with its dynamic cache
    bfloat16      the same weights, laid out by `model/ready.py`
    plain         the same without that layout
    int8          absmax, one scale a channel; fbgemm
    int4          round to nearest, a scale for 128 weights (how codes were found does not matter for speed)

A figure is new tokens per second after the first; transformers' is the difference of two calls. The head stays in
full. Quantized models keep the rest in bfloat16, or with --rest float32 in that.

    python benchmarks/decode_cpu.py --rounds 7
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from timing import interleaved, line, options, ratio, report, summary
from transformers import LlamaConfig, LlamaForCausalLM

from llmctl.engine.speed import decoding_speed
from llmctl.kernels.device import DTYPES
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.checkpoint import new_model
from llmctl.model.leaves import swap
from llmctl.model.packed import PackedLinear, settle
from llmctl.model.ready import ready
from llmctl.quantize.absmax import absmax
from llmctl.recipe.model import ModelSection

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def whole(laid_out: bool) -> LlmctlForCausalLM:
    """The model in bfloat16."""
    model = new_model(ModelSection(**SHAPE), 0).bfloat16().eval()
    if laid_out:
        ready(model)
    return model


def quantized(bits: int, group: int | None, rest: torch.dtype) -> LlmctlForCausalLM:
    """The model with its blocks in a few bits."""
    model = new_model(ModelSection(**SHAPE), 0).to(rest).eval()
    for leaf in list(leaves(model)):
        if leaf.kind == "linear":
            swap(model, leaf.name, PackedLinear(absmax(leaf.module.weight.detach(), bits, group), None))
    settle(model, torch.device("cpu"), exact=False)
    ready(model)
    return model


def theirs(prompt: list[int], tokens: int) -> Callable[[], float]:
    """Tokens per second of transformers."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().eval()
    ids = torch.tensor([prompt])

    def seconds(new: int) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    return lambda: (tokens - 1) / (seconds(tokens) - seconds(1))


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    parser.add_argument("--tokens", type=int, default=49, help="new tokens in a round (default 49)")
    parser.add_argument("--rest", choices=["bfloat16", "float32"], default="bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prompt = torch.randint(0, 32000, (given.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    models = {
        "bfloat16": whole(True),
        "plain": whole(False),
        "int8": quantized(8, None, DTYPES[given.rest]),
        "int4": quantized(4, 128, DTYPES[given.rest]),
    }
    sides = {"transformers": theirs(prompt, given.tokens)}
    for name, model in models.items():
        sides[name] = lambda model=model: decoding_speed(model, prompt, given.tokens)
    interleaved(sides, 1)  # not counted: the first calls allocate
    found = interleaved(sides, given.rounds, ",.1f")
    ratios = {name: ratio(found[name], found["transformers"]) for name in models}
    for name, values in found.items():
        print(line(name, summary(values), unit="tokens/s"))
    for name, one in ratios.items():
        print(line(f"{name} / transformers", one))
    report({**vars(given), "tokens_per_second": {n: summary(v) for n, v in found.items()}, "ratios": ratios})


if __name__ == "__main__":
    main()
