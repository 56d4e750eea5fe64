"""The commands that run a stage on a model: pretrain, generate, eval.

A stage imports torch, which takes seconds, so a recipe is checked before its stage is imported.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmctl.cli.options import (
    AsJson,
    Overrides,
    RecipeFile,
    Words,
    flag,
    given,
    one_model,
    refuse_no_run,
    saved_recipe,
    split_words,
)
from llmctl.cli.output import print_json, print_listing
from llmctl.cli.progress import make_talk
from llmctl.errors import UsageError, UserError


def pretrain(
    ctx: typer.Context,
    words: Words = None,
    tokenizer: Annotated[str | None, flag("pretrain", "tokenizer", "MODEL")] = None,
    data: Annotated[list[str] | None, flag("pretrain", "data", "PATH", many=True)] = None,
    eval_data: Annotated[list[str] | None, flag("pretrain", "eval_data", "PATH", many=True)] = None,
    out: Annotated[str | None, flag("pretrain", "out", "DIR")] = None,
    recipe: RecipeFile = None,
    max_steps: Annotated[int | None, flag("pretrain", "max_steps", "N")] = None,
    seed: Annotated[int | None, flag("pretrain", "seed", "N")] = None,
    device: Annotated[str | None, flag("pretrain", "device", "NAME")] = None,
    dtype: Annotated[str | None, flag("pretrain", "dtype", "NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a language model on text.

    With MODEL, training goes on from that one; without, a new one begins.

    KEY=VALUE sets any field of the recipe, such as train.learning_rate=3e-4 or
    model.hidden_size=512. `llmctl recipe show pretrain` lists them all.
    """
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.schema import PretrainRecipe

    plain, overrides = split_words(words)
    if resume and recipe is None:
        recipe = saved_recipe(out, overrides)
    flags = given(ctx, "pretrain") | {"base": one_model(plain)}
    checked = load_recipe(PretrainRecipe, recipe, flags, overrides)
    if resume and checked.out is None:
        raise UsageError("--resume does not say which run to go on with", "name its folder with --out DIR")
    if resume and recipe is None:
        refuse_no_run(checked.out, checked.data.train)
    from llmctl.stages import pretrain as stage

    result = stage.run(checked, make_talk(), resume=resume, dry_run=dry_run)
    if dry_run:
        (print_json if as_json else print_listing)(result.metrics)
    elif as_json:
        print_json({"run": result.path, "metrics": result.metrics})
    else:
        print_listing({"run": str(result.path), **result.metrics})


def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", hidden=True)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", hidden=True)],
    words: Overrides = None,
    max_new_tokens: Annotated[int | None, flag("generate", "max_new_tokens", "N")] = None,
    temperature: Annotated[float | None, flag("generate", "temperature", "X")] = None,
    top_k: Annotated[int | None, flag("generate", "top_k", "K")] = None,
    top_p: Annotated[float | None, flag("generate", "top_p", "P")] = None,
    seed: Annotated[int | None, flag("generate", "seed", "N")] = None,
    ignore_eos: Annotated[bool | None, flag("generate", "ignore_eos")] = None,
    chat: Annotated[bool | None, flag("generate", "chat")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("generate", "device", "NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Let MODEL continue PROMPT.

    MODEL is a run folder, a Hugging Face folder or a hub id. The text goes to stdout as it comes. KEY=VALUE sets any field of the recipe;
    `llmctl recipe show generate` lists them.
    """
    from llmctl.recipe.generate import GenerateRecipe
    from llmctl.recipe.load import load_recipe

    plain, overrides = split_words(words)
    if plain:
        raise UsageError(f"unexpected argument: {plain[0]}", "put quotes around a PROMPT of several words")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 text (character {error.start + 1})", "convert it to UTF-8"
        ) from None
    checked = load_recipe(GenerateRecipe, recipe, given(ctx, "generate") | {"base": model}, overrides)
    from llmctl.stages import generate as stage

    talk = make_talk()
    if as_json:
        print_json(stage.run(checked, prompt, talk, None))
        return
    result = stage.run(checked, prompt, talk, _write)
    print()
    talk.say(f"{len(result['tokens']):,} tokens, {result['tokens_per_second']:.1f} tokens/s")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def evaluate(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("eval", "data", "PATH", many=True)] = None,
    answers: Annotated[bool | None, flag("eval", "answers")] = None,
    columns: Annotated[str | None, flag("eval", "columns", "ROLE=COLUMN,…")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("eval", "device", "NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well MODEL predicts text.

    Loss, perplexity and bits per byte of text; with --answers, of the answers in conversations, and how many
    the model would give to the letter. MODEL is a run folder, a Hugging Face folder or a hub id. KEY=VALUE sets any field of the recipe; `llmctl recipe show eval` lists them.
    """
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.schema import EvalRecipe

    plain, overrides = split_words(words)
    flags = given(ctx, "eval") | {"base": one_model(plain)}
    checked = load_recipe(EvalRecipe, recipe, flags, overrides)
    if checked.base is None:
        raise UsageError("missing argument MODEL", "name a run folder, a Hugging Face folder or a hub id")
    from llmctl.stages import evaluate as stage

    result = stage.run(checked, make_talk())
    if as_json:
        print_json(result)
    else:
        print_listing({name: value for name, value in result.items() if name != "matches"})
