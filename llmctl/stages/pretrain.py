"""`llmctl pretrain`: train a language model on text, from nothing or from a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.kernels.device import Compute, pick_compute
from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import load_model, load_weights, new_model, save_model
from llmctl.model.config import LlmctlConfig
from llmctl.model.families import write_config
from llmctl.model.open import open_config, open_folded
from llmctl.model.paths import mixing_paths, said
from llmctl.model.steps import after_step
from llmctl.recipe.generate import GenerateSection
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import PretrainRecipe
from llmctl.runs import Run, RunResult, check_out, default_out, finished_metrics
from llmctl.stages.finish import install, write_report
from llmctl.stages.generate import continue_ids, prompt_ids
from llmctl.stages.plan import plan_pretraining, refuse_too_large
from llmctl.stages.text import (
    TextRows,
    for_training,
    highest_id,
    open_tokenizer,
    pad_id_of,
    parent,
    refuse_mismatch,
    refuse_swapped_tokenizer,
    row_length,
    score_rows,
    text_rows,
    token_ids,
    training_batches,
)
from llmctl.talk import SILENT, Talk
from llmctl.tokenizer.load import TOKENIZER, fingerprint
from llmctl.tokenizer.template import stop_ids, template_hash
from llmctl.train.checkpoint import checkpoints
from llmctl.train.loop import Job, train
from llmctl.train.losses import LOSSES

STAGE = "pretrain"
SAMPLES, SAMPLE_TOKENS = 3, 80  # in the report


@dataclass
class Inputs:
    """What a pretraining run needs besides data, checked to fit together."""

    tokenizer: PreTrainedTokenizerFast
    spec: ModelSection
    compute: Compute
    max_length: int


def run(recipe: PretrainRecipe, talk: Talk, *, resume: bool = False, dry_run: bool = False) -> RunResult:
    """Train, and leave a run folder that opens as a Hugging Face model.

    The folder is made only when tokenizer, model and data are known to be good.

    Raises:
        UserError: anything the user can mend before the run, or a full disk during it.
        CheckFailed: loss or gradient stopped being finite.
        Interrupted: Ctrl-C; the state was saved.
    """
    out = Path(recipe.out) if recipe.out else default_out(STAGE)
    if dry_run:
        inputs = prepare(recipe)
        return RunResult(
            None,
            plan_pretraining(recipe, inputs.tokenizer, inputs.spec, inputs.compute, inputs.max_length),
        )
    # the folder is no part of what a run is: repeating it elsewhere must be possible
    saved = dump_recipe(
        recipe.model_copy(
            update={"out": None, "model": recipe.model or (None if recipe.base else ModelSection())}
        )
    )
    if resume and (finished := finished_metrics(STAGE, out, saved)) is not None:
        talk.say(f"{out}: this run is done; nothing to resume")
        return RunResult(out, finished)
    check_out(out, resume)
    inputs = prepare(recipe)
    if resume and not checkpoints(out):
        talk.say(f"{out}: no checkpoint to resume from; starting afresh")
    model = build_model(recipe, inputs)  # before the data, which may take long to tokenize
    train_rows, eval_rows = text_rows(
        recipe.data, inputs.tokenizer, inputs.max_length, recipe.train.seed, talk
    )
    talk.say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {inputs.compute}")
    talk.say(said(mixing_paths(model.model, inputs.max_length)))
    fields = {
        "seed": recipe.train.seed,
        "device": str(inputs.compute),
        "parents": _parents(recipe),
        "data": _data_fields(recipe, train_rows, eval_rows),
        "tokenizer": fingerprint(inputs.tokenizer),
        "template": template_hash(inputs.tokenizer),
    }
    with Run.start(STAGE, out, saved, resume=resume, **fields) as opened:
        job = _job(recipe, inputs, model, train_rows, eval_rows, out)
        metrics = train(job, talk)
        install(partial(_save_files, model, inputs.tokenizer), out)
        write_report(out, STAGE, metrics, _samples(out, inputs))
        opened.finish(metrics)
    return RunResult(out, metrics)


def prepare(recipe: PretrainRecipe) -> Inputs:
    """Load and check everything that is cheap to check. Raises UserError."""
    if not recipe.data.train:
        raise UserError("no data to train on", "name files with --data, or try --data builtin:tinyworld")
    if recipe.train.dtype == "float16":
        raise UserError(
            "train.dtype: float16 needs loss scaling, which this loop does not do",
            "use bfloat16, float32 or auto",
        )
    compute = pick_compute(recipe.device, recipe.train.dtype)
    source = recipe.tokenizer or recipe.base
    if source is None:
        raise UserError("no tokenizer", "name one with --tokenizer; `llmctl tokenizer train` makes it")
    # first, because a broken config.json would look like a broken tokenizer
    spec = open_config(recipe.base).spec if recipe.base is not None else None
    tokenizer = open_tokenizer(source)
    if spec is not None:
        refuse_mismatch(tokenizer, spec.vocab_size or 0, source)
        _refuse_other_tokenizer(recipe, tokenizer)
    else:
        rows = max(len(tokenizer), highest_id(tokenizer) + 1)
        spec = (recipe.model or ModelSection()).resolved(vocab_size=rows)
        if spec.stack != "decoder":
            raise UserError(
                f"model.stack: `{spec.stack}`, but `llmctl pretrain` teaches models to write",
                "set model.stack to decoder",
            )
        refuse_mismatch(tokenizer, spec.vocab_size or 0, source)
        # a family that cannot express the model would otherwise show at the first save
        write_config(LlmctlConfig.of(spec))
    length = row_length(recipe.data.max_length, spec.max_position_embeddings, "data.max_length")
    return Inputs(tokenizer, spec, compute, length)


def build_model(recipe: PretrainRecipe, inputs: Inputs) -> LlmctlForCausalLM:
    """The model to train: float32 weights on the run's device, `base` or fresh from the seed."""
    if recipe.base is not None:
        model = open_folded(recipe.base, torch.float32)
    else:
        refuse_too_large(inputs.spec)
        ids = token_ids(inputs.tokenizer, stop_ids(inputs.tokenizer))
        model = new_model(inputs.spec, recipe.train.seed, **ids)
    return for_training(model, recipe.train, inputs.compute)


def _job(
    recipe: PretrainRecipe,
    inputs: Inputs,
    model: LlmctlForCausalLM,
    train_rows: TextRows,
    eval_rows: TextRows | None,
    out: Path,
) -> Job:
    settings = recipe.train

    def evaluate() -> dict[str, float]:
        assert eval_rows is not None
        rows, limit = settings.per_device_eval_batch_size, settings.eval_max_rows
        return score_rows(model, eval_rows, inputs.tokenizer, inputs.compute, rows, limit).figures()

    return Job(
        model=model,
        batches=training_batches(train_rows, recipe.data, settings, pad_id_of(inputs.tokenizer)),
        loss=LOSSES["causal_lm"],
        settings=settings,
        compute=inputs.compute,
        folder=out,
        save=partial(_save_files, model, inputs.tokenizer),
        load=partial(load_weights, model),
        evaluate=evaluate if eval_rows is not None else None,
        after_step=partial(after_step, model),
        compiled=settings.torch_compile,
    )


def _save_files(model: LlmctlForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Model and tokenizer, so that every checkpoint is a MODEL by itself."""
    save_model(model, folder)
    tokenizer.save_pretrained(folder)


def _samples(out: Path, inputs: Inputs) -> list[tuple[str, str]]:
    """What the model that was just written says when it begins from nothing."""
    tokenizer = inputs.tokenizer
    model = load_model(out, device=inputs.compute.device)
    ids = prompt_ids(tokenizer, "", False, str(out)) if tokenizer.bos_token_id is not None else []
    samples = []
    for seed in range(SAMPLES if ids else 0):
        settings = GenerateSection(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
        samples.append(("", continue_ids(model, tokenizer, ids, settings, SILENT, None)["text"]))
    return samples


def _parents(recipe: PretrainRecipe) -> list[dict[str, Any]]:
    found = [("model", recipe.base), ("tokenizer", recipe.tokenizer)]
    return [parent(role, where) for role, where in found if where is not None]


def _data_fields(recipe: PretrainRecipe, train_rows: TextRows, eval_rows: TextRows | None) -> dict[str, Any]:
    fields = {"train": train_rows.manifest(recipe.data.train)}
    if eval_rows is not None:
        fields["eval"] = eval_rows.manifest(recipe.data.eval or recipe.data.train)
    return fields


def _refuse_other_tokenizer(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model goes on with the tokenizer it was trained with: other ids would mean other words."""
    assert recipe.base is not None
    if recipe.tokenizer is None:
        refuse_swapped_tokenizer(tokenizer, recipe.base)
        return
    base = Path(recipe.base).expanduser()
    if base.is_dir() and not (base / TOKENIZER).is_file():
        # weights that came without a tokenizer: only a manifest, if there is one, can tell
        refuse_swapped_tokenizer(tokenizer, recipe.base)
        return
    theirs = open_tokenizer(recipe.base)
    refuse_swapped_tokenizer(theirs, recipe.base)
    if fingerprint(theirs) != fingerprint(tokenizer):
        raise UserError(
            f"{recipe.tokenizer}: not the tokenizer that {recipe.base} was trained with",
            "leave out --tokenizer to use the model's own",
        )
