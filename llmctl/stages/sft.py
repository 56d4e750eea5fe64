"""`llmctl sft`: teach a model to answer, from conversations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmctl.data.batches import Batches, Laid, eval_batches
from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.errors import UserError
from llmctl.evaluate.perplexity import score
from llmctl.kernels.cross_entropy import slice_tokens
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import target_names
from llmctl.model.leaves import leaves
from llmctl.model.steps import after_step
from llmctl.plan.memory import adapter_training_bytes, training_bytes
from llmctl.plan.size import total_parameters
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.tune import SftRecipe
from llmctl.runs import Run, RunResult, check_out, default_out, finished_metrics
from llmctl.stages.finish import first_and_last_samples, install, write_report
from llmctl.stages.rows import TalkRows, require_data, talk_rows
from llmctl.stages.text import pad_id_of
from llmctl.stages.tune import Base, Tuned, prepare_base, resolved, tuned
from llmctl.talk import Talk, beginning, ending
from llmctl.train.checkpoint import checkpoints
from llmctl.train.loop import Job, total_steps, train
from llmctl.train.losses import LOSSES
from llmctl.train.patience import forget_best

STAGE = "sft"
SAMPLES = 3  # prompts answered on the way
SHOWN = 50  # characters of a prompt beside its answer
NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # a weight of 4 bits, a scale of 8 for every 64, one of 32 for every 256 scales


def run(recipe: SftRecipe, talk: Talk, *, resume: bool = False, dry_run: bool = False) -> RunResult:
    """Train, and leave a run folder with an adapter, or with a whole model where all weights were trained.

    The folder is made only when model, template and data are known to be good.

    Raises:
        UserError: anything the user can mend before the run, or a full disk during it.
        CheckFailed: loss or gradient stopped being finite.
        Interrupted: Ctrl-C; the state was saved.
    """
    require_data(recipe.data.train, "train on")
    recipe, about_rate = resolved(recipe)
    out = Path(recipe.out) if recipe.out else default_out(STAGE)
    # the folder is no part of what a run is: repeating it elsewhere must be possible
    saved = dump_recipe(recipe.model_copy(update={"out": None}))
    if resume and (finished := finished_metrics(STAGE, out, saved)) is not None:
        talk.say(f"{out}: this run is done; nothing to resume")
        return RunResult(out, finished)
    if not dry_run:
        check_out(out, resume)
    base = prepare_base(
        recipe.base,
        device=recipe.device,
        dtype=recipe.train.dtype,
        template=recipe.data.template,
        max_length=recipe.data.max_length,
        talk=talk,
    )
    rows, held = talk_rows(recipe.data, base.tokenizer, base.max_length, recipe.train.seed, talk)
    if held is None and recipe.train.early_stopping_patience is not None:
        raise UserError(
            "train.early_stopping_patience: there is nothing to evaluate on",
            "name files in data.eval, or set data.eval_fraction above 0",
        )
    talk.say(about_rate)
    if dry_run:
        return RunResult(None, _plan(recipe, base, rows))
    if resume and not checkpoints(out):
        talk.say(f"{out}: no checkpoint to resume from; starting afresh")
    model = tuned(base, recipe.method, recipe.lora, recipe.train.seed, recipe.train.gradient_checkpointing)
    trained = sum(weight.numel() for weight in model.model.parameters() if weight.requires_grad)
    talk.say(f"training {trained:,} parameters ({recipe.method}) on {base.compute}")
    model.tell(talk)
    fields = {
        "seed": recipe.train.seed,
        **base.manifest(),
        "base_precision": "nf4" if recipe.method == "qlora" else None,
        "needs_merging": model.needs_merging,
        "data": _data_fields(recipe, rows, held),
    }
    with Run.start(STAGE, out, saved, resume=resume, **fields) as opened:
        metrics = train(_job(recipe, base, model, rows, held, out, talk), talk)
        metrics["trained_parameters"] = trained
        install(model.save, out)
        write_report(out, STAGE, metrics, first_and_last_samples(out))
        opened.finish(metrics)
        forget_best(out)
    return RunResult(out, metrics)


def _job(
    recipe: SftRecipe,
    base: Base,
    model: Tuned,
    rows: TalkRows,
    held: TalkRows | None,
    out: Path,
    talk: Talk,
) -> Job:
    settings = recipe.train
    batches = Batches(
        rows.laid,
        max_length=base.max_length,
        batch_size=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        seed=settings.seed,
        pad_id=pad_id_of(base.tokenizer),
    )
    evaluate = partial(talk_loss, model, base, held.laid, recipe) if held is not None else None
    return Job(
        model=model.model,
        batches=batches,
        loss=LOSSES["causal_lm"],
        settings=settings,
        compute=base.compute,
        folder=out,
        save=model.save,
        load=model.load,
        evaluate=evaluate,
        sample=partial(_answers, model, base, (held or rows).prompts(SAMPLES), settings.sample_tokens, talk),
        sample_steps=settings.sample_steps,
        after_step=partial(after_step, model.model),
        patience=settings.early_stopping_patience,
    )


def talk_loss(model: Tuned, base: Base, laid: Laid, recipe: SftRecipe) -> dict[str, float]:
    """Loss in nats per trained token, perplexity, and tokens, over the rows of `laid`."""
    settings = recipe.train
    batches = eval_batches(
        laid,
        batch_size=settings.per_device_eval_batch_size,
        pad_id=pad_id_of(base.tokenizer),
        max_rows=settings.eval_max_rows,
    )
    figures = score(model.inner, batches, 0.0, base.compute).figures()
    return {name: figures[name] for name in ("loss", "perplexity", "tokens")}


def _answers(
    model: Tuned, base: Base, prompts: list[tuple[list[int], list[int]]], longest: int, talk: Talk, step: int
) -> list[dict[str, Any]]:
    """What the model says to some prompts, likeliest token by token; the first prompt and answer are shown."""
    tokenizer, found = base.tokenizer, []
    for prompt, reference in prompts:
        room = min(longest, base.config.max_position_embeddings - len(prompt))
        with base.compute.autocast():
            ids = list(generate(model.inner, prompt, room, likeliest, base.stop_ids)) if room > 0 else []
        found.append(
            {
                "prompt": tokenizer.decode(prompt),
                "answer": tokenizer.decode(ids),
                "reference": tokenizer.decode(reference),
            }
        )
        if len(found) == 1:
            asked, answered = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, ids))
            talk.say(f"step {step}: {ending(asked, SHOWN)} → {_shown_answer(answered, ids, room)}")
    return found


def _shown_answer(text: str, ids: list[int], room: int) -> str:
    """An answer on one line, or in brackets why there is nothing to show."""
    if room <= 0:
        return "(no room in the context for an answer)"
    if text.strip():
        return beginning(text, 2 * SHOWN)
    return "(ends at once)" if len(ids) == 1 else f"({len(ids)} tokens without text)"


def _data_fields(recipe: SftRecipe, rows: TalkRows, held: TalkRows | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"train": rows.manifest(recipe.data.train)}
    if held is not None:
        fields["eval"] = held.manifest(recipe.data.eval or recipe.data.train)
    return fields | {"text_field": recipe.data.text_field, "columns": recipe.data.columns}


def _plan(recipe: SftRecipe, base: Base, rows: TalkRows) -> dict[str, Any]:
    """Rows, tokens, steps, parameters and memory; the data was read and checked in full."""
    train_, spec = recipe.train, base.config.spec.model_copy(update={"vocab_size": base.rows})
    per_step = train_.per_device_train_batch_size * train_.gradient_accumulation_steps
    whole = total_parameters(spec)
    memory = training_bytes(
        spec,
        train_.per_device_train_batch_size,
        base.max_length,
        base.compute.dtype.itemsize,
        train_.gradient_checkpointing,
        slice_tokens(base.compute.device.type),
    )
    trained = whole
    if recipe.method != "full":
        with torch.device("meta"):
            model = LlmctlForCausalLM(base.config)
        names = set(target_names(model, recipe.lora.target_modules))
        chosen = [leaf for leaf in leaves(model) if leaf.name.rsplit(".", 1)[-1] in names]
        trained = sum(recipe.lora.r * sum(leaf.shape) for leaf in chosen)
        tables = 1 if spec.tie_word_embeddings else 2  # rows of the embedding, and of a head of its own
        trained += tables * len(base.unseen) * spec.hidden_size
        compute_bytes = base.compute.dtype.itemsize
        memory = adapter_training_bytes(
            spec,
            memory,
            trained=trained,
            matrix_bytes=NF4_BYTES if recipe.method == "qlora" else compute_bytes,
            compute_bytes=compute_bytes,
            trained_rows=bool(base.unseen),
            on_cpu=base.compute.device.type == "cpu",
        )
    return {
        "device": str(base.compute),
        "parameters": whole,
        "trained_parameters": trained,
        "records": rows.account.kept,
        "rows": len(rows.laid.rows),
        "trained_tokens": rows.laid.trained_tokens,
        "steps": total_steps(train_, -(-len(rows.laid.rows) // per_step)),
        "memory_bytes": {**memory, "total": sum(memory.values())},
    }
