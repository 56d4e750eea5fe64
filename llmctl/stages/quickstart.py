"""`llmctl quickstart`: the lifecycle on built-in data, in minutes, without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import GenerateRecipe, PretrainRecipe, TokenizerRecipe
from llmctl.runs import MANIFEST, RUNS, RunResult, read_manifest
from llmctl.stages import generate, pretrain, tokenizer
from llmctl.talk import Talk

WORLD = "builtin:tinyworld"
VOCABULARY = 768
PROMPT = "Anna"


def run(out: str | None, seed: int | None, device: str | None, talk: Talk) -> dict[str, Any]:
    """Tokenizer, pretraining, and a text from the trained model.

    Stages that are done already in `out` are kept, so it is safe to run again.

    Returns:
        rows: one a stage with stage, seconds, size and figure; sample: prompt and text.

    Raises UserError: as the stages do.
    """
    folder = Path(out) if out else RUNS / "quickstart"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but --out names a folder", "choose another name")
    rows = []
    words, seconds = _timed(lambda: _tokenizer(folder / "tokenizer", talk))
    rows.append(
        _row(
            "tokenizer",
            seconds,
            words,
            f"{words.metrics['vocab_size']:,} entries",
            f"{words.metrics['bytes_per_token']:.2f} bytes/token",
        )
    )
    model, seconds = _timed(lambda: _pretrain(folder, seed, device, talk))
    rows.append(
        _row(
            "pretrain",
            seconds,
            model,
            f"{_parameters(folder / 'pretrain'):,} parameters",
            f"{model.metrics['eval_bits_per_byte']:.3f} bits/byte held out",
        )
    )
    asked = load_recipe(
        GenerateRecipe,
        None,
        _flags(base=str(folder / "pretrain"), device=device),
        ["generate.temperature=0", "generate.max_new_tokens=60"],
    )
    text, seconds = _timed(lambda: generate.run(asked, PROMPT, talk))
    rows.append(
        {
            "stage": "generate",
            "seconds": seconds,
            "size": f"{len(text['tokens'])} tokens",
            "figure": f"{text['tokens_per_second']:.0f} tokens/s",
        }
    )
    return {"rows": rows, "sample": {"prompt": PROMPT, "text": text["text"]}, "run": str(folder / "pretrain")}


def _tokenizer(out: Path, talk: Talk) -> RunResult:
    if (done := _done(out)) is not None:
        talk.say(f"{out}: done before; kept")
        return done
    talk.say("stage 1 of 3: tokenizer")
    recipe = load_recipe(
        TokenizerRecipe, None, {"data.train": [WORLD], "vocab_size": VOCABULARY, "out": str(out)}, []
    )
    return tokenizer.run(recipe, talk)


def _pretrain(folder: Path, seed: int | None, device: str | None, talk: Talk) -> RunResult:
    out = folder / "pretrain"
    if (done := _done(out)) is not None:
        talk.say(f"{out}: done before; kept")
        return done
    talk.say("stage 2 of 3: pretrain")
    flags = _flags(tokenizer=str(folder / "tokenizer"), out=str(out), device=device) | {"train.seed": seed}
    recipe = load_recipe(PretrainRecipe, "quickstart-pretrain", flags, [])
    return pretrain.run(recipe, talk, resume=out.exists())


def _done(out: Path) -> RunResult | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    return RunResult(out, manifest["metrics"]) if manifest.get("status") == "done" else None


def _parameters(run: Path) -> int:
    from llmctl.model.checkpoint import load_model

    return sum(weight.numel() for weight in load_model(run).parameters())


def _row(stage: str, seconds: float, result: RunResult, size: str, figure: str) -> dict[str, Any]:
    return {"stage": stage, "seconds": seconds, "size": size, "figure": figure, "run": str(result.path)}


def _flags(**values: str | None) -> dict[str, Any]:
    return dict(values)


def _timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
