"""What `llmctl reward` and `llmctl dpo` share: from pairs of answers to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmctl.evaluate.intervals import share_interval
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.tune import DpoRecipe, RewardRecipe
from llmctl.runs import Run, RunResult, check_out, default_out, finished_metrics
from llmctl.stages.finish import install, write_report
from llmctl.stages.pairs import Pair, PairRows, pair_rows
from llmctl.stages.rows import require_data
from llmctl.stages.text import pad_id_of
from llmctl.stages.tune import Base, Tuned, prepare_base, resolved, tuned
from llmctl.talk import Talk
from llmctl.train.checkpoint import checkpoints
from llmctl.train.preference import PreferenceJob, train_preferences


def train_on_pairs(recipe: RewardRecipe | DpoRecipe, talk: Talk, *, resume: bool) -> RunResult:
    """Train, and leave a run folder with an adapter, or with a whole model where all weights were trained.

    The folder is made only when model, template and data are known to be good.

    Raises:
        UserError: anything the user can mend before the run, or a full disk during it.
        CheckFailed: loss or gradient stopped being finite.
        Interrupted: Ctrl-C; the state was saved.
    """
    stage = recipe.stage_name
    require_data(recipe.data.train, "train on")
    recipe, about_rate = resolved(recipe)
    out = Path(recipe.out) if recipe.out else default_out(stage)
    # the folder is no part of what a run is: repeating it elsewhere must be possible
    saved = dump_recipe(recipe.model_copy(update={"out": None}))
    if resume and (finished := finished_metrics(stage, out, saved)) is not None:
        talk.say(f"{out}: this run is done; nothing to resume")
        return RunResult(out, finished)
    check_out(out, resume)
    base = prepare_base(
        recipe.base,
        device=recipe.device,
        dtype=recipe.train.dtype,
        template=recipe.data.template,
        max_length=recipe.data.max_length,
        talk=talk,
    )
    rows, held = pair_rows(recipe.data, base.tokenizer, base.max_length, recipe.train.seed, talk)
    if resume and not checkpoints(out):
        talk.say(f"{out}: no checkpoint to resume from; starting afresh")
    task = "reward" if isinstance(recipe, RewardRecipe) else "causal"
    model = tuned(
        base, recipe.method, recipe.lora, recipe.train.seed, recipe.train.gradient_checkpointing, task
    )
    trained = sum(weight.numel() for weight in model.model.parameters() if weight.requires_grad)
    talk.say(
        f"training {trained:,} parameters ({recipe.method}) on {base.compute}, {len(rows.pairs):,} pairs"
    )
    talk.say(about_rate)
    model.tell(talk)
    fields = {
        "seed": recipe.train.seed,
        **base.manifest(),
        "base_precision": "nf4" if recipe.method == "qlora" else None,
        "needs_merging": model.needs_merging,
        "data": _data_fields(recipe, rows, held),
    }
    with Run.start(stage, out, saved, resume=resume, **fields) as opened:
        metrics = train_preferences(_job(recipe, base, model, rows, held, out), talk)
        metrics |= {"trained_parameters": trained, **_judged(metrics, held)}
        install(model.save, out)
        write_report(out, stage, metrics, [])
        opened.finish(metrics)
    return RunResult(out, metrics)


def _job(
    recipe: RewardRecipe | DpoRecipe,
    base: Base,
    model: Tuned,
    rows: PairRows,
    held: PairRows | None,
    out: Path,
) -> PreferenceJob:
    whole = isinstance(recipe, RewardRecipe)
    return PreferenceJob(
        model=model.model,
        objective=recipe.reward if isinstance(recipe, RewardRecipe) else recipe.dpo,
        rows=[_row(pair, whole) for pair in rows.pairs],
        eval_rows=[_row(pair, whole) for pair in held.pairs] if held is not None else [],
        settings=recipe.train,
        compute=base.compute,
        folder=out,
        pad_id=pad_id_of(base.tokenizer),
        save=model.save,
        load=model.load,
    )


def _row(pair: Pair, whole: bool) -> dict[str, list[int]]:
    """A pair as its trainer takes it: a reward model reads prompt and answer as one."""
    if whole:
        return {
            "chosen_ids": pair.prompt_ids + pair.chosen_ids,
            "rejected_ids": pair.prompt_ids + pair.rejected_ids,
        }
    return {
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
    }


def _judged(metrics: dict[str, Any], held: PairRows | None) -> dict[str, Any]:
    """What the accuracy on held-out pairs is worth: its interval, and what a rule about length alone gets."""
    if held is None:
        return {}
    count = len(held.pairs)
    low, high = share_interval(metrics["eval_accuracy"] * count, count)
    return {
        "eval_pairs": count,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_shorter_wins": held.shorter_wins(),
    }


def _data_fields(recipe: RewardRecipe | DpoRecipe, rows: PairRows, held: PairRows | None) -> dict[str, Any]:
    fields = {"train": rows.manifest(recipe.data.train)}
    if held is not None:
        fields["eval"] = held.manifest(recipe.data.eval or recipe.data.train)
    return fields | {"columns": recipe.data.columns}
