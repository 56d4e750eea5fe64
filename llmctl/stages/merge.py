"""`llmctl merge`: an adapter folded into its base, proven on what was written to disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llmctl.errors import CheckFailed, UserError
from llmctl.files import read_json
from llmctl.kernels.device import DTYPES, Compute, pick_compute
from llmctl.kernels.threads import use_threads
from llmctl.locate import locate
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import ADAPTER_CONFIG, TASKS, is_adapter
from llmctl.model.checkpoint import FILES, save_model
from llmctl.model.open import open_base, open_folded, open_model, stored_dtype
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.tune import CompareRows, CompareSection, MergeRecipe
from llmctl.runs import Run, RunResult, accept_refused, check_out, default_out, run_of
from llmctl.stages.compare import held_together, shared_rows
from llmctl.stages.finish import install
from llmctl.stages.gate import (
    faithful_kl,
    kept_hint,
    out_of_bounds,
    refuse_drift,
    rounded_dtype,
    say_accepted,
)
from llmctl.stages.rows import TalkRows
from llmctl.stages.text import open_tokenizer, parent
from llmctl.talk import Talk
from llmctl.tokenizer.load import fingerprint
from llmctl.tokenizer.template import stop_ids, template_hash

STAGE = "merge"
PROOF = {"answers": 0, "max_tokens": 512}  # enough where no rounding hides a fault


@dataclass(frozen=True)
class _Merge:
    """A merge whose inputs were checked."""

    folder: Path
    recipe: MergeRecipe
    rows: TalkRows
    compute: Compute
    talk: Talk

    def compare(
        self, a: LlmctlForCausalLM, b: LlmctlForCausalLM, settings: CompareRows, noise: torch.dtype | None
    ) -> dict[str, Any]:
        """Two models on the rows of the merge."""
        return held_together(a, b, self.rows, str(self.folder), settings, self.compute, noise, self.talk)


def run(recipe: MergeRecipe, talk: Talk, accept: bool = False) -> RunResult:
    """Fold, write, read back and compare. A model that is not what the adapter was is kept, but refused.

    Args:
        accept: keep what is refused as if it were not; a folder that holds such a result is not made again.

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
    settings = recipe.compare.model_copy(update={} if recipe.compare.data else _data_of(folder))
    recipe = recipe.model_copy(update={"compare": settings})
    text = dump_recipe(recipe.model_copy(update={"out": None}))
    parents = [parent("model", str(folder))]
    if accept and (known := accept_refused(STAGE, out, text, parents=parents)) is not None:
        return RunResult(out, known)
    check_out(out, resumable=False)
    compute = pick_compute(recipe.device, settings.dtype, "compare.dtype")
    use_threads(settings.threads, "compare.threads", compute.device, talk)
    tokenizer = open_tokenizer(str(folder))
    rows = shared_rows(str(folder), str(folder), settings, talk)
    adapted = open_model(folder, compute.dtype, compute.device)
    job = _Merge(folder, recipe, rows, compute, talk)
    effect = _effect(job, adapted)
    talk.say(f"the adapter moves its base by {effect:.4g} nats per token")
    if (run_of(folder) or {}).get("base_precision") == "nf4":
        talk.say("the adapter was trained on a base in NF4: it is folded into that base, written out in full")
    fields = {
        "device": str(compute),
        "parents": parents,
        "tokenizer": fingerprint(tokenizer),
        "template": template_hash(tokenizer),
        "stop_ids": stop_ids(tokenizer),
        "never_seen": (run_of(folder) or {}).get("never_seen", []),
    }
    with Run.start(STAGE, out, text, **fields) as opened:
        found: dict[str, Any] = {}
        install(partial(_write_and_prove, job, adapted, tokenizer, found), out)
        answers, failed = found.pop("answers"), found.pop("failed")
        metrics = found | {"effect": effect}
        opened.finish(metrics, failed, accept)
    say_accepted(failed, accept, talk)
    refuse_drift([] if accept else failed, folder, "the merged model", kept_hint(out))
    return RunResult(out, metrics | {"answers": answers})


def _write_and_prove(
    job: _Merge,
    adapted: LlmctlForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    found: dict[str, Any],
    target: Path,
) -> None:
    model = open_folded(job.folder, torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id
    less = job.recipe.compare.model_copy(update=PROOF)
    folded = job.compare(adapted, model.to(job.compute.device), less, None)
    save_model(model.to("cpu", DTYPES.get(job.recipe.dtype) or stored_dtype(job.folder)), target)
    tokenizer.save_pretrained(target)
    written = open_model(target, job.compute.dtype, job.compute.device)
    read = job.compare(model.to(job.compute.device, job.compute.dtype), written, less, None)
    found |= job.compare(adapted, written, job.recipe.compare, rounded_dtype(job.folder, target))
    bound = job.recipe.compare.max_kl
    found |= {"folded_kl": folded["kl"], "written_kl": read["kl"]}
    found |= {"allowed_kl": faithful_kl(folded) if bound is None else bound}
    found["failed"] = _drift(job.recipe.compare, folded, read, found)


def _drift(
    bounds: CompareSection, folded: Mapping[str, Any], read: Mapping[str, Any], found: Mapping[str, Any]
) -> list[str]:
    """What is wrong with a merge.

    Folding and writing are each held to be exact. What rounding to the stored precision costs between them grows with
    the adapter, and is judged only by a bound that the recipe sets.
    """
    failed = [
        f"{when}: {line}"
        for when, figures in (("before rounding", folded), ("read back from the disk", read))
        for line in out_of_bounds(figures, bounds.min_top1, faithful_kl(figures))
    ]
    return failed if bounds.max_kl is None else failed + out_of_bounds(found, bounds.min_top1, bounds.max_kl)


def _effect(job: _Merge, adapted: LlmctlForCausalLM) -> float:
    """KL(base, adapter) in nats per token. Raises CheckFailed if the adapter does nothing, or NaN comes out."""
    base = open_base(job.folder, torch.float32).to(device=job.compute.device, dtype=job.compute.dtype)
    bounds = job.recipe.compare
    effect = job.compare(base, adapted, bounds.model_copy(update={"answers": 0}), None)["kl"]
    if math.isnan(effect):
        raise CheckFailed(
            f"{job.folder}: the odds its base or the adapter gives are not numbers",
            "is the base any good? `llmctl eval` it",
        )
    if effect < bounds.min_effect:
        raise CheckFailed(
            f"{job.folder}: the adapter changes nothing: {effect:.3g} nats per token against its base",
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
