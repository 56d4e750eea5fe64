"""The command that makes a model smaller, and its receipt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmctl.cli.options import AsJson, RecipeFile, Words, flag
from llmctl.cli.output import echo, figure, print_json, print_listing, print_table, size
from llmctl.cli.progress import make_talk
from llmctl.cli.tune import Accept, checked, show_answers

FEW = 6  # layers that are named; run.json lists them all
# title, metric before, metric after, how it is shown
BEFORE_AFTER = (
    ("weights", "size_bytes_before", "size_bytes", size),
    ("perplexity", "perplexity_before", "perplexity", figure),
    ("tokens/s", "tokens_per_second_before", "tokens_per_second", figure),
    ("answers that end", "stop_rate_a", "stop_rate_b", figure),
)


def quantize(
    ctx: typer.Context,
    words: Words = None,
    method: Annotated[str | None, flag("quantize", "method", "int8|gptq")] = None,
    bits: Annotated[int | None, flag("quantize", "bits", "8|4|3")] = None,
    group_size: Annotated[str | None, flag("quantize", "group_size", "N|channel")] = None,
    calibration: Annotated[list[str] | None, flag("quantize", "calibration", "PATH", many=True)] = None,
    eval_data: Annotated[list[str] | None, flag("quantize", "eval_data", "PATH", many=True)] = None,
    out: Annotated[str | None, flag("quantize", "out", "DIR")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("quantize", "device", "NAME")] = None,
    threads: Annotated[str | None, flag("quantize", "threads", "N|auto")] = None,
    accept: Accept = False,
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

    result = stage.run(recipe_checked, make_talk(), accept=accept)
    if as_json:
        print_json({"run": result.path, "metrics": result.metrics})
    else:
        print_receipt(str(result.path), dict(result.metrics))


def print_receipt(run: str, found: dict[str, Any]) -> None:
    """The answers of both models, then the figures, so that these are what a small screen ends with."""
    show_answers(found.pop("answers", []))
    rows = []
    for title, *keys, shown in BEFORE_AFTER:
        before, after = (found.pop(key) for key in keys)
        if before is not None:
            rows.append((title, shown(before), shown(after)))
    echo()
    print_table(("", "before", "after"), rows)
    echo()
    kept = found.pop("kept")
    named = ", ".join(kept[:FEW]) + (f" and {len(kept) - FEW} more" if len(kept) > FEW else "")
    print_listing({"run": run, **found, "in full": named or "none"})
