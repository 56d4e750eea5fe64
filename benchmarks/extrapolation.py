"""Train each kind of position on rows of 256 tokens, and read rows of up to 2048: perplexity, as a table and a plot.

python benchmarks/extrapolation.py --text FILE --work DIR [--plot FILE.svg] [--threads 1]

The decoders, the text and the training are those of benchmarks/variants.py, with more steps. NTK and YaRN are not
trained: they are the model with plain rotary positions, its rotation stretched by 8. A table of learned positions has
2048 rows, of which training reaches 256: that is what there is to go on with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import variants
from timing import options, report

from llmctl.files import read_json, write_json
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import EvalRecipe
from llmctl.report import Series, curve_svg
from llmctl.stages import evaluate, pretrain
from llmctl.talk import SILENT

TRAINED, LENGTHS, STEPS, FACTOR = variants.LENGTH, (256, 512, 1024, 2048), 400, 8.0
KINDS = ("rope", "learned", "sinusoidal", "alibi", "relative", "none")
STRETCHED: dict[str, dict[str, Any]] = {
    "rope, NTK": {"rope_type": "ntk", "rope_theta": 10000.0, "factor": FACTOR},
    "rope, YaRN": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": FACTOR,
        "original_max_position_embeddings": TRAINED,
    },
}
DOCUMENT = 20_000  # characters, so that a document fills the longest row


def documents(text: Path, work: Path) -> tuple[Path, Path]:
    """Training and held-out text, in documents longer than the longest row."""
    whole = text.read_text(encoding="utf-8")
    pieces = [whole[at : at + DOCUMENT] for at in range(0, len(whole), DOCUMENT)]
    paths = work / "long-train.jsonl", work / "long-held.jsonl"
    for path, part in zip(paths, (pieces[:-5], pieces[-5:]), strict=True):
        lines = (json.dumps({"text": piece}) for piece in part)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def train(kind: str, text: Path, work: Path, threads: int) -> Path:
    """A trained decoder with this kind of position; `max_position_embeddings` is what is asked of it later."""
    out = work / f"position-{kind}"
    if not out.exists():
        words = [
            f"model.position={kind}",
            f"model.max_position_embeddings={LENGTHS[-1]}",
            "model.family=llmctl",
            f"data.max_length={TRAINED}",
            *variants.BESIDE.get(kind, []),
        ]
        recipe = variants.recipe_of(words, text, work, threads)
        steps = recipe.train.model_copy(
            update={"max_steps": STEPS, "eval_steps": STEPS, "save_steps": STEPS, "logging_steps": STEPS}
        )
        pretrain.run(recipe.model_copy(update={"out": str(out), "train": steps}), SILENT)
    return out


def stretched(rope: Path, name: str, work: Path) -> Path:
    """The same weights with another rotation."""
    out = work / name.replace(", ", "-")
    out.mkdir(exist_ok=True)
    for file in rope.iterdir():
        if file.is_file() and file.name not in ("config.json", "run.json"):
            (out / file.name).unlink(missing_ok=True)
            (out / file.name).symlink_to(file.resolve())
    write_json(out / "config.json", read_json(rope / "config.json") | {"rope_parameters": STRETCHED[name]})
    return out


def perplexities(model: Path, held: Path, work: Path) -> dict[int, float]:
    """Row length -> perplexity of the held-out text."""
    found = {}
    for length in LENGTHS:
        words = [
            f"eval.data=[{json.dumps(str(held))}]",
            f"eval.max_length={length}",
            f"eval.batch_size={max(1, LENGTHS[-1] // length)}",
            f"eval.cache_dir={work / 'cache'}",
        ]
        recipe = load_recipe(EvalRecipe, None, {"base": str(model), "device": "cpu"}, words)
        found[length] = float(evaluate.run(recipe, SILENT)["perplexity"])
    return found


def table(found: dict[str, dict[int, float]]) -> str:
    """As Markdown."""
    lines = [f"| position | {' | '.join(map(str, LENGTHS))} |", "|---" * (len(LENGTHS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[n]:.1f}' for n in LENGTHS)} |" for name, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--text", required=True, help="a text file of about a megabyte")
    parser.add_argument("--work", required=True, help="folder for what is made on the way")
    parser.add_argument("--plot", help="where to write the plot")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    variants.make_tokenizer(variants.paragraphs(Path(given.text), work), work)
    text, held = documents(Path(given.text), work)
    models = {kind: train(kind, text, work, given.threads) for kind in KINDS}
    models |= {name: stretched(models["rope"], name, work) for name in STRETCHED}
    found: dict[str, dict[int, float]] = {}
    for name, model in models.items():
        found[name] = perplexities(model, held, work)
        print(name, found[name], flush=True)
    print(table(found))
    if given.plot:
        # in nats, so that one kind that fails leaves room for the others
        series = [Series(name, [(n, math.log(ppl)) for n, ppl in row.items()]) for name, row in found.items()]
        drawn = curve_svg("nats per token by tokens in a row", series, "tokens in a row")
        Path(given.plot).write_text(drawn + "\n", encoding="utf-8")
    report({"perplexity": found})


if __name__ == "__main__":
    main()
