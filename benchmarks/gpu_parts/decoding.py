"""Decoding one sequence with a Llama of about a billion random parameters: ours, quantized, and transformers' `generate`.

A figure is new tokens per second after the first. The bytes of the weights that a token needs, over the time of a
token, are given as a share of the copy bandwidth measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from timing import interleaved
from transformers import LlamaForCausalLM

from gpu_parts.measure import rate, within
from gpu_parts.models import random_ids, random_llama, shape, transformers_twin
from gpu_parts.report import Report, Row
from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.engine.speed import decoding_speed
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.leaves import swap
from llmctl.model.packed import PackedLinear, settle
from llmctl.quantize.absmax import absmax

PROMPT, TOKENS, ROUNDS = 128, 65, 4
QUANTIZED = {"int8": (8, None), "int4, groups of 128": (4, 128)}


def run(report: Report) -> None:
    _Decoding(report).run()


class _Decoding:
    """One model in several precisions, and transformers' beside it."""

    def __init__(self, report: Report) -> None:
        self.report, self.spec = report, shape("1B", report.tiny)
        self.prompt = random_ids(self.spec, 1, report.size(PROMPT, 8))[0].tolist()
        self.tokens = report.size(TOKENS, 4)
        self.model = self._whole()
        self.theirs = transformers_twin(self.model).eval()

    def run(self) -> None:
        report = self.report
        report.case("1B, bfloat16, margin-free agreement with transformers", self.same_tokens)
        report.case("1B, bfloat16", lambda: self.speed("llmctl", self.model))
        report.case("1B, bfloat16, prompt of 2,048 tokens", self.prefill)
        for name, how in QUANTIZED.items():
            report.case(f"1B, {name}", partial(self.quantized, name, *how), seconds=report.size(20, 0))

    def _whole(self) -> LlmctlForCausalLM:
        return random_llama(self.spec, self.report.device, torch.bfloat16).eval()

    @torch.no_grad()
    def same_tokens(self) -> Row:
        """Ours may choose another token only where transformers' logits are within rounding of each other."""
        ids = list(generate(self.model, self.prompt, self.tokens, likeliest))
        row = torch.tensor([self.prompt + ids], device=self.report.device)
        logits = self.theirs(row).logits[0, len(self.prompt) - 1 : -1].float()
        chosen = logits.gather(1, row[0, len(self.prompt) :, None]).squeeze(1)
        lost = float((logits.amax(-1) - chosen).max())
        # bfloat16 holds 8 bits: two roundings of the largest logit
        bound = 2 * float(logits.abs().max()) * 2**-7
        return within(lost, bound, note="the most by which transformers prefers another token, in its logits")

    def speed(self, name: str, model: LlmctlForCausalLM) -> Row:
        sides: dict[str, Callable[[], float]] = {
            name: lambda: decoding_speed(model, self.prompt, self.tokens),
            "transformers, bfloat16": lambda: their_speed(self.theirs, self.prompt, self.tokens, self.report),
        }
        interleaved(sides, 1)  # not counted: the first calls allocate
        speeds = interleaved(sides, self.report.size(ROUNDS, 1))
        row = rate(speeds, name, "transformers, bfloat16", "tokens/s")
        return row | {"bytes": row["value"] * weight_bytes(model)}

    @torch.inference_mode()
    def prefill(self) -> Row:
        """Tokens of the prompt that are read in a second, ours and theirs."""
        ids = random_ids(self.spec, 1, self.report.size(2048, 24)).to(self.report.device)

        def timed(model: torch.nn.Module) -> Callable[[], float]:
            def pass_of() -> float:
                self.report.synchronize()
                began = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
                self.report.synchronize()
                return ids.numel() / (time.perf_counter() - began)

            return pass_of

        sides = {"llmctl": timed(self.model), "transformers": timed(self.theirs)}
        interleaved(sides, 2)
        speeds = interleaved(sides, self.report.size(ROUNDS, 1))
        return rate(speeds, "llmctl", "transformers", "tokens/s")

    def quantized(self, name: str, bits: int, group: int | None) -> Row:
        model = self._whole()
        group = min(group, self.spec.hidden_size) if group else None
        for leaf in [each for each in leaves(model) if each.kind == "linear"]:
            matrix = absmax(leaf.module.weight.detach(), bits, group)
            swap(model, leaf.name, PackedLinear(matrix, None))
        settle(model, self.report.device, exact=False)
        paths = {module.path for module in model.modules() if isinstance(module, PackedLinear)}
        return self.speed(name, model) | {"note": f"path: {', '.join(sorted(paths))}"}


def their_speed(model: LlamaForCausalLM, prompt: list[int], tokens: int, report: Report) -> float:
    """Of transformers' `generate` with its own cache: the difference of two calls."""
    ids = torch.tensor([prompt], device=report.device)

    def seconds(new: int) -> float:
        report.synchronize()
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        report.synchronize()
        return time.perf_counter() - began

    one = seconds(1)
    return (tokens - 1) / max(1e-9, seconds(tokens) - one)


def weight_bytes(model: LlmctlForCausalLM) -> int:
    """Bytes of the weights that one token is multiplied with."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    whole = [leaf.module.weight for leaf in leaves(model)]
    return sum(module.stored_bytes for module in packed) + sum(w.numel() * w.element_size() for w in whole)
