"""The commands that adapt a model and prove the result: sft, reward, dpo, score, merge, convert, compare."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmctl.cli.options import (
    AsJson,
    RecipeFile,
    Words,
    flag,
    given,
    one_model,
    saved_recipe,
    split_words,
)
from llmctl.cli.output import print_json, print_listing
from llmctl.cli.progress import make_talk
from llmctl.errors import UsageError

Accept = Annotated[bool, typer.Option("--accept", help="keep the result though its check refuses it")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]
MODEL = "name a run folder, a Hugging Face folder or a hub id"
SHOWN = 60  # characters of an answer in the listing of a comparison


def sft(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("sft", "data", "PATH", many=True)] = None,
    eval_data: Annotated[list[str] | None, flag("sft", "eval_data", "PATH", many=True)] = None,
    lora: Annotated[bool, typer.Option("--lora", help="train adapters: method=lora")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="adapters on a four-bit base: method=qlora")] = False,
    full: Annotated[bool, typer.Option("--full", help="train all weights: method=full")] = False,
    template: Annotated[str | None, flag("sft", "template", "NAME|FILE")] = None,
    out: Annotated[str | None, flag("sft", "out", "DIR")] = None,
    recipe: RecipeFile = None,
    max_steps: Annotated[int | None, flag("sft", "max_steps", "N")] = None,
    seed: Annotated[int | None, flag("sft", "seed", "N")] = None,
    device: Annotated[str | None, flag("sft", "device", "NAME")] = None,
    dtype: Annotated[str | None, flag("sft", "dtype", "NAME")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Teach MODEL to answer, from conversations.

    Alpaca, messages, ShareGPT, prompt-completion and text files are told apart by themselves. `llmctl data
    inspect` shows what will be trained. KEY=VALUE sets any field of the recipe, such as lora.r=32;
    `llmctl recipe show sft` lists them.
    """
    from llmctl.recipe.tune import SftRecipe

    settled = checked(SftRecipe, ctx, "sft", words, recipe, resume)
    from llmctl.stages import sft as stage

    _show(stage.run(settled, make_talk(), resume=resume, dry_run=dry_run), as_json)


def reward(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("reward", "data", "PATH", many=True)] = None,
    eval_data: Annotated[list[str] | None, flag("reward", "eval_data", "PATH", many=True)] = None,
    lora: Annotated[bool, typer.Option("--lora", help="train adapters: method=lora")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="adapters on a four-bit base: method=qlora")] = False,
    full: Annotated[bool, typer.Option("--full", help="train all weights: method=full")] = False,
    template: Annotated[str | None, flag("reward", "template", "NAME|FILE")] = None,
    out: Annotated[str | None, flag("reward", "out", "DIR")] = None,
    recipe: RecipeFile = None,
    max_steps: Annotated[int | None, flag("reward", "max_steps", "N")] = None,
    seed: Annotated[int | None, flag("reward", "seed", "N")] = None,
    device: Annotated[str | None, flag("reward", "device", "NAME")] = None,
    dtype: Annotated[str | None, flag("reward", "dtype", "NAME")] = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Make a reward model of MODEL, from preferences.

    KEY=VALUE sets any field of the recipe; `llmctl recipe show reward` lists them.
    """
    from llmctl.recipe.tune import RewardRecipe

    settled = checked(RewardRecipe, ctx, "reward", words, recipe, resume)
    from llmctl.stages import reward as stage

    _show(stage.run(settled, make_talk(), resume=resume), as_json)


def dpo(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("dpo", "data", "PATH", many=True)] = None,
    eval_data: Annotated[list[str] | None, flag("dpo", "eval_data", "PATH", many=True)] = None,
    lora: Annotated[bool, typer.Option("--lora", help="train adapters: method=lora")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="adapters on a four-bit base: method=qlora")] = False,
    full: Annotated[bool, typer.Option("--full", help="train all weights: method=full")] = False,
    beta: Annotated[float | None, flag("dpo", "beta", "X")] = None,
    template: Annotated[str | None, flag("dpo", "template", "NAME|FILE")] = None,
    out: Annotated[str | None, flag("dpo", "out", "DIR")] = None,
    recipe: RecipeFile = None,
    max_steps: Annotated[int | None, flag("dpo", "max_steps", "N")] = None,
    seed: Annotated[int | None, flag("dpo", "seed", "N")] = None,
    device: Annotated[str | None, flag("dpo", "device", "NAME")] = None,
    dtype: Annotated[str | None, flag("dpo", "dtype", "NAME")] = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Let MODEL prefer the chosen answers, from preferences.

    By direct preference optimization (DPO); MODEL itself, as it is before training, is the reference.
    KEY=VALUE sets any field of the recipe; `llmctl recipe show dpo` lists them.
    """
    from llmctl.recipe.tune import DpoRecipe

    settled = checked(DpoRecipe, ctx, "dpo", words, recipe, resume)
    from llmctl.stages import dpo as stage

    _show(stage.run(settled, make_talk(), resume=resume), as_json)


def score(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("score", "data", "PATH", many=True)] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("score", "device", "NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank answers with a reward MODEL.

    For preferences it also says how often the chosen answer scores higher. KEY=VALUE sets any field of the
    recipe; `llmctl recipe show score` lists them.
    """
    from llmctl.recipe.tune import ScoreRecipe

    settled = checked(ScoreRecipe, ctx, "score", words, recipe, False)
    from llmctl.stages import score as stage

    found = stage.run(settled, make_talk())
    if as_json:
        print_json(found)
        return
    for row in found.pop("rows"):
        print(f"{row['score']:+9.4f}  {row.get('side', ''):8}  {row['place']}  {_short(row['answer'])}")
    print_listing(found)


def merge(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("merge", "data", "PATH", many=True)] = None,
    out: Annotated[str | None, flag("merge", "out", "DIR")] = None,
    dtype: Annotated[str | None, flag("merge", "dtype", "NAME")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("merge", "device", "NAME")] = None,
    accept: Accept = False,
    as_json: AsJson = False,
) -> None:
    """Fold the adapter of RUN into its base, and prove the result.

    The folded model is held against the adapter, and what is read back from disk against the folded model; exit
    code 3 if they differ, or if the adapter changes nothing. A result that is refused is kept; --accept takes it
    as it is. KEY=VALUE sets any field of the recipe; `llmctl recipe show merge` lists them.
    """
    from llmctl.recipe.tune import MergeRecipe

    settled = checked(MergeRecipe, ctx, "merge", words, recipe, False)
    from llmctl.stages import merge as stage

    result = stage.run(settled, make_talk(), accept=accept)
    if as_json:
        print_json({"run": result.path, "metrics": result.metrics})
    else:
        _show_comparison({"run": str(result.path), **result.metrics})


def convert(
    ctx: typer.Context,
    words: Words = None,
    family: Annotated[str | None, flag("convert", "family", "NAME")] = None,
    dtype: Annotated[str | None, flag("convert", "dtype", "NAME")] = None,
    out: Annotated[str | None, flag("convert", "out", "DIR")] = None,
    allow_pickle: Annotated[bool | None, flag("convert", "allow_pickle")] = None,
    recipe: RecipeFile = None,
    as_json: AsJson = False,
) -> None:
    """Write MODEL as another family, or in another precision.

    With --allow-pickle it may lie in pytorch_model.bin, which no other command reads. KEY=VALUE sets any field of the recipe; `llmctl recipe show convert`
    lists them.
    """
    from llmctl.recipe.convert import ConvertRecipe

    settled = checked(ConvertRecipe, ctx, "convert", words, recipe, False)
    from llmctl.stages import convert as stage

    _show(stage.run(settled, make_talk()), as_json)


def compare(
    ctx: typer.Context,
    words: Words = None,
    data: Annotated[list[str] | None, flag("compare", "data", "PATH", many=True)] = None,
    min_top1: Annotated[float | None, flag("compare", "min_top1", "SHARE")] = None,
    max_kl: Annotated[float | None, flag("compare", "max_kl", "NATS")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, flag("compare", "device", "NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare models A and B on the same data: odds and answers.

    Preferred tokens, divergence, perplexity, how often answers end, and the answers side by side. Exit code 3
    if they are further apart than --min-top1 and --max-kl allow. KEY=VALUE sets any field of the recipe;
    `llmctl recipe show compare` lists them.
    """
    from llmctl.recipe.load import load_recipe
    from llmctl.recipe.tune import CompareRecipe

    plain, overrides = split_words(words)
    if len(plain) > 2:
        raise UsageError(f"unexpected argument: {plain[2]}", "two models are compared: A and B")
    named = dict(zip(("base", "other"), plain, strict=False))
    settled = load_recipe(CompareRecipe, recipe, given(ctx, "compare") | named, overrides)
    if settled.base is None or settled.other is None:
        raise UsageError(
            "missing arguments A and B" if not plain else "missing argument B",
            f"two models are compared: {MODEL}",
        )
    from llmctl.stages import compare as stage
    from llmctl.stages.gate import refuse_drift

    found = stage.run(settled, make_talk())
    if as_json:
        print_json(found)
    else:
        _show_comparison({name: value for name, value in found.items() if name != "failed"})
    refuse_drift(found["failed"], settled.base, settled.other)


def checked(
    kind: Any, ctx: typer.Context, stage: str, words: list[str] | None, recipe: str | None, resume: bool
) -> Any:
    """The recipe of a command that takes one MODEL."""
    from llmctl.recipe.load import load_recipe

    plain, overrides = split_words(words)
    if resume and recipe is None:
        recipe = saved_recipe(ctx.params.get("out"), overrides)
    flags = given(ctx, stage) | {"base": one_model(plain), "method": _method(ctx)}
    if flags["method"] is None:
        del flags["method"]
    found = load_recipe(kind, recipe, flags, overrides)
    if resume and found.out is None:
        raise UsageError("--resume does not say which run to go on with", "name its folder with --out DIR")
    if found.base is None:
        raise UsageError("missing argument MODEL", MODEL)
    return found


def _method(ctx: typer.Context) -> str | None:
    """--lora, --qlora and --full are words for one field."""
    named = [name for name in ("lora", "qlora", "full") if ctx.params.get(name)]
    if len(named) > 1:
        raise UsageError(f"--{named[0]} and --{named[1]} exclude each other", "give one of them")
    return named[0] if named else None


def _show(result: Any, as_json: bool) -> None:
    if result.path is None:
        (print_json if as_json else print_listing)(result.metrics)
    elif as_json:
        print_json({"run": result.path, "metrics": result.metrics})
    else:
        print_listing({"run": str(result.path), **result.metrics})


def _show_comparison(found: dict[str, Any]) -> None:
    answers = found.pop("answers", [])
    print_listing(found)
    show_answers(answers)


def show_answers(answers: list[dict[str, Any]]) -> None:
    """What two models said to the same prompts, side by side; once where they said the same."""
    for number, one in enumerate(answers, 1):
        print(f"\nprompt {number}  {_short(one['prompt'])}")
        sides = {"a": one["a"]} if one["a"] == one["b"] else {"a": one["a"], "b": one["b"]}
        for side, text in sides.items():
            print(f"  {'both' if len(sides) == 1 else side:4}  {_short(text)}")


def _short(text: str) -> str:
    """The end of a long text, on one line: of a prompt and of an answer alike that is what matters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= SHOWN * 2 else f"… {line[-2 * SHOWN :]}"
