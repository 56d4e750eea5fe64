"""Train every variant of the architecture on the same text for the same number of steps; bits per byte of each.

python benchmarks/variants.py --text FILE --work DIR [--only WORDS …] [--threads 1]

One table for all: a decoder of 1 M parameters with one thing changed at a time, as `llmctl recipe variants` asks for
it. What reads ahead is trained to fill in masked bytes, in a table of its own, whose numbers are bits per masked byte.
A variant that is done is not trained again: results.json in DIR holds what there is. This compares pieces at a size
at which they can be compared in minutes, and ranks nothing for larger models.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from timing import options, report

from llmctl.model.checkpoint import new_of_stack
from llmctl.plan.size import active_parameters, total_parameters
from llmctl.recipe.load import load_recipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe, TokenizerRecipe
from llmctl.recipe.variants import AXES
from llmctl.stages import pretrain, tokenizer

VOCABULARY, LENGTH, ROWS, STEPS = 1024, 256, 8, 200
HELD_OUT, PEAK = 0.05, 2e-3
MASK = 256  # what stands in place of a masked byte
SIZES = [
    "model.hidden_size=128",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "model.intermediate_size=352",
    f"model.max_position_embeddings={LENGTH}",
]
TRAINING = [
    f"train.max_steps={STEPS}",
    f"train.per_device_train_batch_size={ROWS}",
    f"train.learning_rate={PEAK}",
    "train.warmup_ratio=0.1",
    f"train.eval_steps={STEPS}",
    f"train.save_steps={STEPS}",
    f"train.logging_steps={STEPS}",
    "train.dtype=float32",
]
# the axes whose entries are compared; the others choose formats, or sizes that are the same everywhere
COMPARED = (
    "position",
    "norm",
    "norm_placement",
    "attention",
    "heads",
    "pattern",
    "mixer",
    "ffn",
    "experts",
    "options",
)
# words of a table that are sized for a longer context than this one
RESIZED = {
    "model.sliding_window=256": "model.sliding_window=64",
    "model.embedding_multiplier=16.0": "model.embedding_multiplier=11.3",
}
# waves of height 1 drown embeddings of 0.02, which the original therefore makes as large (arXiv:1706.03762, section 3.4)
BESIDE = {"sinusoidal": ["model.embedding_multiplier=50.0"]}
# experts of half the width, two of which are what the plain layer is
HALF = "model.experts.moe_intermediate_size=176"
WINDOW, GLOBAL, BLOCKS = "model.sliding_window=16", "model.num_global_tokens=4", "model.block_size=16"
MIXTURES = {
    "longformer": f"model.pattern=[band+global] {WINDOW} {GLOBAL}",
    "bigbird": f"model.pattern=[band+global+random] {WINDOW} {GLOBAL} {BLOCKS} model.num_random_blocks=2",
    "star-transformer": "model.pattern=[band+global] model.sliding_window=2 model.num_global_tokens=1",
    "etc": f"model.pattern=[band+global] {WINDOW} {GLOBAL} model.position=relative",
    "three sliding, one full": "model.pattern=[sliding,sliding,sliding,full] model.sliding_window=64",
    "sliding and routing": "model.pattern=[sliding,routing] model.sliding_window=64",
    "mamba2 and full": "model.pattern=[mamba2,full]",
}


def variants() -> dict[str, list[str]]:
    """Name -> the words that ask for it, the plain model first."""
    found: dict[str, list[str]] = {"plain": []}
    for axis in COMPARED:
        for name, variant in AXES[axis].variants.items():
            words = [RESIZED.get(word, word) for word in variant.words]
            more = [HALF] if any(word.startswith("model.experts.kind") for word in words) else []
            found[f"{axis}: {name}"] = [*words, *more, *BESIDE.get(name, [])]
    found |= {f"mixture: {name}": words.split() for name, words in MIXTURES.items()}
    plain = spec_of([])
    return {name: words for name, words in found.items() if name == "plain" or spec_of(words) != plain}


def spec_of(words: list[str]) -> ModelSection:
    found = recipe_of(words, Path("."), Path("."), 1).model
    assert found is not None
    return found.resolved(VOCABULARY)


def recipe_of(words: list[str], text: Path, work: Path, threads: int) -> PretrainRecipe:
    chosen = {word.split("=")[0] for word in words}
    sizes = [size for size in SIZES if size.split("=")[0] not in chosen]
    fields = [
        f"data.train=[{json.dumps(str(text))}]",
        f"data.eval_fraction={HELD_OUT}",
        f"data.cache_dir={work / 'cache'}",
    ]
    flags = {"tokenizer": str(work / "tokenizer"), "train.threads": threads, "device": "cpu"}
    return load_recipe(PretrainRecipe, None, flags, [*sizes, *TRAINING, *fields, *words])


def make_tokenizer(text: Path, work: Path) -> None:
    out = work / "tokenizer"
    if not out.exists():
        words = [f"data.train=[{json.dumps(str(text))}]", f"vocab_size={VOCABULARY}"]
        tokenizer.run(load_recipe(TokenizerRecipe, None, {"out": str(out)}, words), pretrain.SILENT)


def paragraphs(text: Path, work: Path) -> Path:
    """The text in documents of some kilobytes, so that a part of it can be held out."""
    out = work / "text.jsonl"
    if not out.exists():
        whole, size = text.read_text(encoding="utf-8"), 4000
        lines = (json.dumps({"text": whole[at : at + size]}) for at in range(0, len(whole), size))
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def train(words: list[str], text: Path, work: Path, threads: int) -> dict[str, float]:
    """A decoder through `llmctl pretrain`: bits per byte of the held-out documents."""
    recipe, out = recipe_of(words, text, work, threads), work / "run"
    rmtree(out, ignore_errors=True)
    metrics = pretrain.run(recipe.model_copy(update={"out": str(out)}), pretrain.SILENT).metrics
    rmtree(out)
    return {"bits_per_byte": metrics["eval_bits_per_byte"], "tokens_per_second": metrics["tokens_per_second"]}


def train_masked(spec: ModelSection, text: Path) -> dict[str, float]:
    """An encoder that fills in 15 % of the bytes (BERT, arXiv:1810.04805): bits per masked byte of the first rows.

    Over bytes, whose neighbours say much of them: over the tokens of a small text, so few steps teach no more
    than how often each occurs.
    """
    ids = torch.tensor(list(text.read_bytes()))
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held = max(1, int(len(rows) * HELD_OUT))
    model = new_of_stack(spec.model_copy(update={"stack": "encoder", "vocab_size": MASK + 1}), seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)

    def loss_of(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        hidden = torch.rand(batch.shape, generator=generator) < 0.15
        return model(batch.masked_fill(hidden, MASK), labels=batch.masked_fill(~hidden, -100)).loss

    for step in range(STEPS):
        warm = min(1.0, (step + 1) / (0.1 * STEPS))
        optimizer.param_groups[0]["lr"] = PEAK * warm * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        chosen = torch.randint(held, len(rows), (ROWS,), generator=draw)
        loss_of(rows[chosen], draw).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        same = torch.Generator().manual_seed(1)
        losses = [loss_of(batch, same) for batch in rows[:held].split(ROWS)]
    return {"bits_per_masked_byte": float(torch.stack(losses).mean()) / math.log(2)}


def sizes(spec: ModelSection) -> dict[str, int]:
    return {"parameters": total_parameters(spec), "active": active_parameters(spec)}


def measure(given: Namespace) -> dict[str, dict[str, Any]]:
    """Every variant that is asked for and not done yet; results.json is written after each."""
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    text, kept = paragraphs(Path(given.text), work), work / "results.json"
    make_tokenizer(text, work)
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, words in variants().items():
        if name in results or (given.only and not any(word in name for word in given.only)):
            continue
        spec = spec_of(words)
        for kind in ("decoder", "encoder") if name == "plain" else (spec.stack,):
            if kind == "decoder":
                found = train(words, text, work, given.threads)
            else:
                found = train_masked(spec, Path(given.text))
            label = "plain encoder" if name == "plain" and kind == "encoder" else name
            results[label] = {"words": " ".join(words), **sizes(spec), **found}
            print(label, *(f"{key}={value:.4g}" for key, value in found.items()), flush=True)
        kept.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Both tables as Markdown. Speeds are not told: the variants did not run in turn."""
    lines = ["| variant | parameters | a token's | bits per byte |", "|---|---:|---:|---:|"]
    for name, row in results.items():
        if "bits_per_byte" in row:
            lines.append(_line(name, row, "bits_per_byte"))
    lines += ["", "| encoder | parameters | a token's | bits per masked byte |", "|---|---:|---:|---:|"]
    lines += [
        _line(name, row, "bits_per_masked_byte")
        for name, row in results.items()
        if "bits_per_masked_byte" in row
    ]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any], figure: str) -> str:
    return f"| {name} | {row['parameters']:,} | {row['active']:,} | {row[figure]:.3f} |"


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--text", required=True, help="a text file of about a megabyte")
    parser.add_argument("--work", required=True, help="folder for what is made on the way, and results.json")
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of them")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = measure(given)
    print(table(results))
    report({"variants": results})


if __name__ == "__main__":
    main()
