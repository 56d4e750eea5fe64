"""Which way each layer of a model mixes tokens, to be said once before a run."""

from __future__ import annotations

from collections import Counter

from llmctl.model.attention import GroupedQueryAttention
from llmctl.model.context import plain_context
from llmctl.model.hf import LlmctlModel
from llmctl.model.mla import MultiHeadLatentAttention

# path of kernels/attention.py -> what it is
WORDS = {
    "open": "attention to everything",
    "causal": "causal attention",
    "blocks": "attention by blocks of keys",
    "dense": "attention under a dense mask",
}
# kinds of layers that have a path of their own
OWN = {"routing": "sorted clusters", "lsh": "sorted buckets", "mamba2": "a scan in chunks"}


def mixing_paths(model: LlmctlModel, length: int) -> dict[str, int]:
    """What mixes the tokens of a row of `length` that is one document -> the number of layers that do it so.

    Documents that share a row are each taken by themselves where the path is the causal one.
    """
    ctx = plain_context(length, device=model.embed_tokens.weight.device)
    ctx.causality = "none" if model.spec.stack == "encoder" else "causal"
    model.prepare(ctx)
    found: Counter[str] = Counter()
    for layer, block in enumerate(model.layers):
        mixer = block.self_attn
        if isinstance(mixer, (GroupedQueryAttention, MultiHeadLatentAttention)):
            softcapped = model.spec.attn_logit_softcapping is not None
            found[
                "attention by its definition" if softcapped else WORDS[ctx.visible(mixer.pattern).path]
            ] += 1
        else:
            found[OWN[model.spec.layer_pattern(layer)]] += 1
    return dict(found)


def said(paths: dict[str, int]) -> str:
    """As one line of talk."""
    parts = [f"{count} {'layer' if count == 1 else 'layers'} by {way}" for way, count in paths.items()]
    return f"tokens are mixed in {', '.join(parts)}"
