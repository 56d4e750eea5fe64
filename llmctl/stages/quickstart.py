"""`llmctl quickstart`: the lifecycle on built-in data, in minutes, without a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.data import tinyworld
from llmctl.errors import UserError
from llmctl.evaluate.exact import exact_matches
from llmctl.kernels.device import pick_compute, pick_device
from llmctl.model.checkpoint import load_config, load_model
from llmctl.plan.size import total_parameters
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import GenerateRecipe, PretrainRecipe, TokenizerRecipe
from llmctl.runs import MANIFEST, RUNS, RunResult, read_manifest
from llmctl.stages import generate, pretrain, tokenizer
from llmctl.stages.text import completion_pairs
from llmctl.talk import Talk
from llmctl.tokenizer.load import load_tokenizer

TOKENIZER_RECIPE, PRETRAIN_RECIPE = "quickstart-tokenizer", "quickstart-pretrain"


@dataclass
class _Setting:
    """Where and how the lifecycle runs."""

    folder: Path
    seed: int | None
    device: str | None
    talk: Talk

    @property
    def words(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def base(self) -> Path:
        return self.folder / "pretrain"


def run(out: str | None, seed: int | None, device: str | None, talk: Talk) -> dict[str, Any]:
    """Tokenizer, pretraining, a test of what the model knows, and a text from it.

    Stages that are done already in `out` are kept, so it is safe to run again.

    Returns:
        rows: one a stage with stage, seconds, size and figure; sample: prompt and text; run: the model.

    Raises UserError: as the stages do.
    """
    folder = Path(out) if out else RUNS / "quickstart"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but --out names a folder", "choose another name")
    pick_device(device or "auto")  # a device that is not there should show before any work
    setting = _Setting(folder, seed, device, talk)
    rows = []
    for number, (name, step) in enumerate(STEPS.items(), 1):
        talk.say(f"step {number} of {len(STEPS)}: {name}")
        started = time.perf_counter()
        size, figure = step(setting)
        rows.append({"stage": name, "seconds": time.perf_counter() - started, "size": size, "figure": figure})
    prompt = tinyworld.completions("heldout")[0]["prompt"]
    text = _continued(setting, prompt)["text"]
    return {"rows": rows, "sample": {"prompt": prompt, "text": text}, "run": str(setting.base)}


def _tokenizer(setting: _Setting) -> tuple[str, str]:
    result = _done(setting.words, setting.talk)
    if result is None:
        recipe = load_recipe(TokenizerRecipe, TOKENIZER_RECIPE, {"out": str(setting.words)}, [])
        result = tokenizer.run(recipe, setting.talk)
    return f"{result.metrics['vocab_size']:,} entries", f"{result.metrics['bytes_per_token']:.2f} bytes/token"


def _pretrain(setting: _Setting) -> tuple[str, str]:
    flags = {
        "tokenizer": str(setting.words),
        "out": str(setting.base),
        "device": setting.device,
        "train.seed": setting.seed,
    }
    recipe = load_recipe(PretrainRecipe, PRETRAIN_RECIPE, flags, [])
    result = pretrain.run(recipe, setting.talk, resume=setting.base.exists())
    size = total_parameters(load_config(setting.base).spec)
    return f"{size:,} parameters", f"{result.metrics['eval_bits_per_byte']:.3f} bits/byte on held-out text"


def _known(setting: _Setting) -> tuple[str, str]:
    """How many facts of the world the model completes, such as where a person lives."""
    compute = pick_compute(setting.device or "auto", "float32")
    asked = [*tinyworld.completions("train"), *tinyworld.completions("heldout")]
    pairs = completion_pairs(
        load_tokenizer(str(setting.base)), [(a["prompt"], a["completion"]) for a in asked]
    )
    right = exact_matches(load_model(setting.base, device=compute.device), pairs, compute)
    return f"{len(pairs):,} facts", f"{sum(right) / len(right):.1%} completed rightly"


def _generate(setting: _Setting) -> tuple[str, str]:
    found = _continued(setting, "")
    return f"{len(found['tokens'])} tokens", f"{found['tokens_per_second']:.0f} tokens/s"


def _continued(setting: _Setting, prompt: str) -> dict[str, Any]:
    words = ["generate.temperature=0", "generate.max_new_tokens=60"]
    flags = {"base": str(setting.base), "device": setting.device}
    return generate.run(load_recipe(GenerateRecipe, None, flags, words), prompt, setting.talk)


def _done(out: Path, talk: Talk) -> RunResult | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    if manifest.get("status") != "done":
        return None
    talk.say(f"{out}: done before; kept")
    return RunResult(out, manifest["metrics"])


STEPS: dict[str, Callable[[_Setting], tuple[str, str]]] = {
    "tokenizer": _tokenizer,
    "pretrain": _pretrain,
    "knowledge": _known,
    "generate": _generate,
}
