"""`llmctl merge`: an adapter folded into its base, proven on what was written to disk."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llmctl.errors import CheckFailed, UserError
from llmctl.files import read_json
from llmctl.kernels.device import DTYPES, Compute, pick_compute
from llmctl.locate import locate
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import ADAPTER_CONFIG, TASKS, is_adapter
from llmctl.model.checkpoint import FILES, save_model
from llmctl.model.open import open_base, open_folded, open_model, stored_dtype
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.tune import MergeRecipe
from llmctl.runs import Run, RunResult, check_out, default_out, run_of
from llmctl.stages.compare import held_together, out_of_bounds, refuse_drift, shared_rows
from llmctl.stages.finish import install
from llmctl.stages.rows import TalkRows
from llmctl.stages.text import open_tokenizer, parent
from llmctl.talk import Talk
from llmctl.tokenizer.load import fingerprint
from llmctl.tokenizer.template import stop_ids, template_hash

STAGE = "merge"


def run(recipe: MergeRecipe, talk: Talk) -> RunResult:
    """Fold, write, read back and compare; the folder gets the model only if it still is the adapter's.

    Raises:
        UserError: RUN is no adapter, its base is gone or has changed, there is no data to compare on.
        CheckFailed: the adapter changes nothing, or the merged model is not what the adapter was.
    """
    assert recipe.base is not None
    folder = locate(recipe.base, FILES)
    if not is_adapter(folder):
        raise UserError(
            f"{folder}: not an adapter, so there is nothing to merge",
            "name the folder of an `sft --lora` run",
        )
    if read_json(folder / ADAPTER_CONFIG).get("task_type") == TASKS["reward"]:
        raise UserError(
            f"{folder}: an adapter of a reward model, which is not merged", "`llmctl score` reads it as it is"
        )
    out = Path(recipe.out) if recipe.out else default_out(STAGE)
    check_out(out, resumable=False)
    settings = recipe.compare.model_copy(update={} if recipe.compare.data else _data_of(folder))
    recipe = recipe.model_copy(update={"compare": settings})
    compute = pick_compute(recipe.device, settings.dtype, "compare.dtype")
    tokenizer = open_tokenizer(str(folder))
    rows = shared_rows(str(folder), str(folder), settings, talk)
    adapted = open_model(folder, compute.dtype, compute.device)
    effect = _effect(folder, adapted, rows, recipe, compute)
    talk.say(f"the adapter moves its base by {effect:.4g} nats per token")
    if (run_of(folder) or {}).get("base_precision") == "nf4":
        talk.say("the adapter was trained on a base in NF4: it is folded into that base, written out in full")
    fields = {
        "device": str(compute),
        "parents": [parent("model", str(folder))],
        "tokenizer": fingerprint(tokenizer),
        "template": template_hash(tokenizer),
        "stop_ids": stop_ids(tokenizer),
        "never_seen": (run_of(folder) or {}).get("never_seen", []),
    }
    with Run.start(STAGE, out, dump_recipe(recipe.model_copy(update={"out": None})), **fields) as opened:
        found: dict[str, Any] = {}
        install(partial(_write_and_prove, folder, adapted, rows, recipe, compute, tokenizer, found), out)
        metrics = {name: value for name, value in found.items() if name != "answers"} | {"effect": effect}
        opened.finish(metrics)
    return RunResult(out, metrics | {"answers": found["answers"]})


def _write_and_prove(
    folder: Path,
    adapted: LlmctlForCausalLM,
    rows: TalkRows,
    recipe: MergeRecipe,
    compute: Compute,
    tokenizer: PreTrainedTokenizerFast,
    found: dict[str, Any],
    target: Path,
) -> None:
    model = open_folded(folder, torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id
    save_model(model.to(DTYPES.get(recipe.dtype) or stored_dtype(folder)), target)
    tokenizer.save_pretrained(target)
    written = open_model(target, compute.dtype, compute.device)
    found |= held_together(adapted, written, rows, str(folder), recipe.compare, compute)
    bounds = recipe.compare
    refuse_drift(out_of_bounds(found, bounds.min_top1, bounds.max_kl), folder, "the merged model")


def _effect(
    folder: Path, adapted: LlmctlForCausalLM, rows: TalkRows, recipe: MergeRecipe, compute: Compute
) -> float:
    """KL(base, adapter) in nats per token. Raises CheckFailed if the adapter does nothing, or NaN comes out."""
    base = open_base(folder, torch.float32).to(device=compute.device, dtype=compute.dtype)
    quiet = recipe.compare.model_copy(update={"answers": 0})
    effect = held_together(base, adapted, rows, str(folder), quiet, compute)["kl"]
    if math.isnan(effect):
        raise CheckFailed(
            f"{folder}: the odds its base or the adapter gives are not numbers",
            "is the base any good? `llmctl eval` it",
        )
    if effect < recipe.compare.min_effect:
        raise CheckFailed(
            f"{folder}: the adapter changes nothing: {effect:.3g} nats per token against its base",
            "train it longer or with a higher train.learning_rate; compare.min_effect sets the bound",
        )
    return float(effect)


def _data_of(folder: Path) -> dict[str, Any]:
    """What the adapter was evaluated or trained on, as fields of `compare`."""
    data = (run_of(folder) or {}).get("data", {})
    sources = (data.get("eval") or data.get("train") or {}).get("sources", [])
    if not sources:
        raise UserError(f"{folder}: says nothing of the data it was trained on", "name some with --data FILE")
    return {"data": list(sources), "text_field": data.get("text_field", "text")}
