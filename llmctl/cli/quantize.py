"""The command that makes a model smaller, and its receipt."""

from __future__ import annotations

from typing import Annotated

import typer

from llmctl.cli.options import AsJson, DryRun, Name, RecipeFile, Words, flag
from llmctl.cli.progress import make_talk
from llmctl.cli.run_page import show_result
from llmctl.cli.tune import Accept, checked, show_answers


def quantize(
    ctx: typer.Context,
    words: Words = None,
    method: Annotated[str | None, flag("quantize", "method", "int8|gptq")] = None,
    bits: Annotated[int | None, flag("quantize", "bits", "8|4|3")] = None,
    group_size: Annotated[str | None, flag("quantize", "group_size", "N|channel")] = None,
    calibration: Annotated[list[str] | None, flag("quantize", "calibration", "PATH", many=True)] = None,
    eval_data: Annotated[list[str] | None, flag("quantize", "eval_data", "PATH", many=True)] = None,
    columns: Annotated[str | None, flag("quantize", "columns", "ROLE=COLUMN,…")] = None,
    out: Annotated[str | None, flag("quantize", "out", "DIR")] = None,
    name: Name = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("quantize", "device", "NAME")] = None,
    threads: Annotated[str | None, flag("quantize", "threads", "N|auto")] = None,
    accept: Accept = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Store MODEL in a few bits, and measure the loss.

    The result is read back from disk and held against MODEL on data it was not quantized by: perplexity,
    divergence, preferred tokens, speed. Exit code 3 if it is further away than compare.min_top1 and
    compare.max_kl allow; it is kept then, and --accept takes it as it is. An adapter is folded in first. KEY=VALUE sets any field of the recipe; `llmctl
    recipe show quantize` lists them.
    """
    from llmctl.recipe.quantize import QuantizeRecipe

    recipe_checked = checked(QuantizeRecipe, ctx, "quantize", words, recipe, False)
    from llmctl.stages import quantize as stage

    result = stage.run(recipe_checked, make_talk(), accept=accept, dry_run=dry_run)
    if not as_json and not dry_run:  # before the figures, so that these are what a small screen ends with
        show_answers(result.metrics.get("answers", []))
        print()
    show_result("quantize", result, as_json)
