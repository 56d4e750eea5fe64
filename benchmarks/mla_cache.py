"""Claims: of a token latent attention keeps less than a third of what attention with 8 groups of keys keeps, and decoding
with the up-projections absorbed is faster than with keys and values expanded from the cache.

Bytes are those of DeepSeek-V3's layers in bfloat16, by the planner, and are held against the memory that a layer has
allocated. Time is that of one layer of DeepSeek-V2-Lite's shape (16 heads, 2048 channels, a latent of 512) in float32,
which decodes one token, or a few at once, after so many cached ones; `gqa` is attention of as many heads of 128
channels in 8 groups. Prints milliseconds and how many times as long the others take as `absorbed`:

    OMP_NUM_THREADS=1 python benchmarks/mla_cache.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import compare, line, options, ratio, report, speedups, summary
from torch import Tensor, nn

from llmctl.model.attention import GroupedQueryAttention
from llmctl.model.context import plain_context
from llmctl.model.mla import MultiHeadLatentAttention
from llmctl.model.rope import rotary_tables
from llmctl.plan.size import kv_cache_bytes
from llmctl.recipe.model import ModelSection

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280}
LITE = {"hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": 8}
GROUPS = {"num_key_value_heads": 8, "head_dim": 128}
MOST = 1 / 3  # 576 numbers against 2 · 8 · 128: as much as 2.25 groups would keep
Work = Callable[[], Tensor]


class Chosen(MultiHeadLatentAttention):
    """One computation, whatever the sizes say."""

    absorbed = True

    def absorbs(self, new: int, all_tokens: int) -> bool:
        return self.absorbed


def latent_of(shape: dict[str, int]) -> ModelSection:
    return ModelSection(attention="mla", mla={**LATENT, "q_lora_rank": None}, **shape).resolved()


def grouped_of(shape: dict[str, int]) -> ModelSection:
    return ModelSection(**GROUPS, **shape).resolved()


def bytes_kept() -> dict[str, Any]:
    """Bytes of one token in bfloat16, planned for V3's layers and allocated by one layer."""
    planned = {name: kv_cache_bytes(model(V3), 1, 2) for name, model in KINDS.items()}
    allocated = {}
    for name, mixer in (("latent", MultiHeadLatentAttention), ("gqa", GroupedQueryAttention)):
        with torch.device("meta"):
            layer = mixer(KINDS[name](V3), 0)
        state = layer.init_state(1, 64, torch.bfloat16, torch.device("cpu"))
        state.length = 64
        allocated[name] = state.nbytes // 64 * V3["num_hidden_layers"]
    share = planned["latent"] / planned["gqa"]
    for name, count in planned.items():
        print(f"{name}: {count:,} bytes a token planned, {allocated[name]:,} allocated")
    print(f"latent/gqa {share:.3f}, less than a third: {'yes' if share < MOST else 'NO'}")
    return {"planned": planned, "allocated": allocated, "share": share, "held": share < MOST}


def decoding(mixer: Any, model: ModelSection, past: int, new: int) -> Work:
    """A pass of `new` tokens after `past` random ones, which are then forgotten again."""
    torch.manual_seed(0)
    mixer.eval()
    for weight in mixer.parameters():
        nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.02)
    state = mixer.init_state(1, past + new, torch.float32, torch.device("cpu"))
    state.append(*(torch.randn(*part.shape[:2], past, part.shape[3]) for part in state.parts))
    x = torch.randn(1, new, model.hidden_size)

    @torch.no_grad()
    def work() -> Tensor:
        ctx = plain_context(new, past)
        ctx.rotary = rotary_tables(model, ctx.queries.position)
        out = mixer(x, ctx, state)
        state.cut(past)
        return out

    return work


def measure(past: int, new: int, rounds: int) -> dict[str, Any]:
    sides: dict[str, Work] = {}
    for name in ("absorbed", "expanded"):
        mixer = Chosen(latent_of(LITE), 0)
        mixer.absorbed = name == "absorbed"
        sides[name] = decoding(mixer, latent_of(LITE), past, new)
    sides["gqa"] = decoding(GroupedQueryAttention(grouped_of(LITE), 0), grouped_of(LITE), past, new)
    apart = float((sides["absorbed"]() - sides["expanded"]()).abs().max())
    rule = MultiHeadLatentAttention.absorbs(mixer, new, past + new)
    seconds = compare(sides, rounds)
    found, ratios = {side: summary(s) for side, s in seconds.items()}, speedups(seconds, "absorbed")
    title = f"{new} after {past}"
    for side, one in found.items():
        print(line(f"{title}: {side}", one, 1e3, "ms"))
    for side, one in ratios.items():
        print(line(f"{title}: {side}", one))
    faster = ratio(seconds["expanded"], seconds["absorbed"])["median"] > 1
    print(
        f"{title}: the layer would take {'absorbed' if rule else 'expanded'}; largest difference {apart:.1e}"
    )
    return {"seconds": found, "ratios": ratios, "absorbed_faster": faster, "rule_absorbs": rule}


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--past", type=int, nargs="+", default=[512, 4096], help="cached tokens")
    parser.add_argument("--new", type=int, nargs="+", default=[1, 64, 256], help="new tokens of a pass")
    given: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = [(past, new) for past in given.past for new in given.new]
    timed = {f"{new} after {past}": measure(past, new, given.rounds) for past, new in sizes}
    report({**vars(given), "bytes": bytes_kept(), **timed})


KINDS = {"latent": latent_of, "gqa": grouped_of}


if __name__ == "__main__":
    main()
