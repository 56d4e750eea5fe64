"""Claim: forward and backward of our llama row are at least 1.05 times as fast as LlamaForCausalLM on a CPU.

The same weights, the same rows, the same precision (bf16 autocast unless --dtype says otherwise), in turn. Both sides
take the loss from `labels`; ours is asked for the loss alone, as training does. `--device cuda` adds both sides
compiled, where the claim is never to be slower.

    python benchmarks/core_vs_hf.py --rounds 7
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from pretrain_vs_hf import LENGTH, SPEC, hf_model
from timing import compare, line, options, ratio, report, speedups, summary

from llmctl.kernels.device import pick_compute
from llmctl.model import compile_blocks
from llmctl.model.checkpoint import load_model

ASKED = {"cpu": 1.05, "cuda": 1.0}


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens (default 8)")
    parser.add_argument("--dtype", default="bfloat16", help="autocast to this (default bfloat16)")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    compute = pick_compute(given.device, given.dtype)
    theirs = hf_model().to(given.device).train()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder).to(given.device).train()
        second = load_model(folder).to(given.device).train()
    ids = torch.randint(3, SPEC.vocab_size or 8192, (given.rows, LENGTH), device=given.device)

    def pass_of(model: torch.nn.Module, **more: object) -> Callable[[], float]:
        def work() -> float:
            with compute.autocast():
                loss = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
            if given.device == "cuda":
                torch.cuda.synchronize()
            return float(loss.detach())

        return work

    sides = {"llmctl": pass_of(ours, skip_logits=True), "transformers": pass_of(theirs)}
    apart = abs(sides["llmctl"]() - sides["transformers"]())
    print(f"the losses differ by {apart:.1e} of {sides['transformers']():.2f}")
    if given.device == "cuda":
        compile_blocks(second)
        sides["llmctl compiled"] = pass_of(second, skip_logits=True)
        sides["transformers compiled"] = pass_of(torch.compile(theirs))
    seconds = compare(sides, given.rounds)
    for name, values in seconds.items():
        print(line(name, summary(values), 1e3, "ms"))
    ratios = speedups(seconds, "llmctl")
    for name, found in ratios.items():
        print(line(name, found))
    held = ratio(seconds["transformers"], seconds["llmctl"])["median"] >= ASKED[given.device]
    print(f"at least {ASKED[given.device]} times as fast: {'yes' if held else 'NO'}")
    report(
        {
            "seconds": {name: summary(values) for name, values in seconds.items()},
            "ratios": ratios,
            "held": held,
        }
    )


if __name__ == "__main__":
    main()
