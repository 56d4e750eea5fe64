"""What a quickstart measures of each of its models: loss and exact answers, whether answers end, and time per token."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.errors import Interrupted
from llmctl.evaluate.intervals import share_interval
from llmctl.kernels.device import pick_device
from llmctl.kernels.threads import use_threads
from llmctl.locate import locate
from llmctl.model.checkpoint import FILES
from llmctl.model.open import open_config
from llmctl.recipe.load import load_recipe
from llmctl.recipe.schema import EvalRecipe
from llmctl.recipe.tune import SftData, SftRecipe
from llmctl.runs import METRICS
from llmctl.stages import evaluate, sft
from llmctl.stages.generate import end_ids, load_for_generation
from llmctl.stages.rows import read_rows
from llmctl.stages.text import fitting_tokenizer
from llmctl.talk import SILENT, Bar, Talk
from llmctl.tokenizer.choose import OWN, choose_template

ASKED = 12  # held-out questions that a model answers, to see whether it stops
MOST_NEW = 256  # tokens of an answer, after which it counts as one that does not stop
TRIAL_STEPS = 3  # of which the first also warms up
TRIAL_TOKENS = 512  # in a step
WEIGHTS = "*.safetensors"
FIGURES = (
    *("size_bytes", "loss", "perplexity", "exact_match", "exact_match_low", "exact_match_high"),
    *("asked", "stop_rate", "stop_rate_low", "stop_rate_high"),
    *("preference_accuracy", "preference_accuracy_low", "preference_accuracy_high"),
)


def measure(
    where: str, data: list[str], columns: Mapping[str, str], device: str | None, talk: Talk
) -> dict[str, Any]:
    """The figures of a model on held-out rows, by the names in `FIGURES`; None where one does not apply.

    loss (nats per token of the answers) and perplexity; exact_match, the share of rows whose answer it gives to the
    letter; stop_rate, the share of `asked` answers that end by themselves; `said`, its answer to the first question.

    Raises UserError: as `llmctl eval --answers`.
    """
    found: dict[str, Any] = dict.fromkeys(FIGURES)
    found["size_bytes"] = sum(file.stat().st_size for file in locate(where, FILES).glob(WEIGHTS))
    flags = {"base": where, "device": device, "eval.data": data, "eval.answers": True}
    recipe = load_recipe(EvalRecipe, None, flags | {"eval.columns": dict(columns)}, [])
    figures = evaluate.run(recipe, _OnlyBars(talk))  # the data is that of every other model
    found |= {name: figures[name] for name in FIGURES if name in figures}
    return found | _answers(where, data, columns, device, talk)


def _answers(
    where: str, data: list[str], columns: Mapping[str, str], device: str | None, talk: Talk
) -> dict[str, Any]:
    """How often the likeliest answers to the first questions end by themselves, as `llmctl chat` would give them."""
    tokenizer = fitting_tokenizer(where)
    choose_template(tokenizer, OWN)
    use_threads("auto", "threads", pick_device(device or "auto"), talk)
    model = load_for_generation(where, device or "auto", "auto")
    context = model.config.max_position_embeddings
    settings = SftData(train=data, columns=dict(columns), overlong="truncate", packing=False)
    prompts = read_rows(data, settings, tokenizer, context, SILENT).prompts(ASKED)
    if not prompts:
        return {}
    longest = min(MOST_NEW, 2 * max(len(reference) for _, reference in prompts) + 16)
    ends = end_ids(model, tokenizer)
    stopped, said = 0, ""
    with talk.bar("asking", len(prompts), "questions") as bar:
        for number, (prompt, _) in enumerate(prompts):
            room = min(longest, context - len(prompt))
            ids = list(generate(model, prompt, room, likeliest, ends)) if room > 0 else []
            stopped += bool(ids) and ids[-1] in ends
            said = said if number else tokenizer.decode(ids, skip_special_tokens=True)
            bar.advance(1)
    low, high = share_interval(stopped, len(prompts))
    rate = {"stop_rate": stopped / len(prompts), "stop_rate_low": low, "stop_rate_high": high}
    return {"asked": len(prompts), **rate, "said": said.strip()}


class _OnlyBars:
    """A talk without its lines."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    def say(self, text: str) -> None:
        return

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        """As it is."""
        return self._talk.bar(label, total, unit)


def seconds_per_token(fields: Mapping[str, Any], talk: Talk) -> float:
    """The time that a training step takes for a token here and now: a few steps of `sft`, thrown away.

    Args:
        fields: of the recipe of that training, as base and data.train.

    Raises UserError: as `llmctl sft`.
    """
    talk.say("measuring a training step on this machine …")
    assert isinstance(fields["base"], str)
    length = min(TRIAL_TOKENS, open_config(fields["base"]).max_position_embeddings)
    trial = {
        "data.max_length": length,
        "data.overlong": "truncate",
        "data.eval_fraction": 0,
        "train.max_steps": TRIAL_STEPS,
        "train.per_device_train_batch_size": max(1, TRIAL_TOKENS // length),
        "train.sample_tokens": 1,
        "train.logging_steps": 1,
        "train.save_steps": TRIAL_STEPS,
    }
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        out = Path(folder) / "trial"
        try:
            sft.run(load_recipe(SftRecipe, None, {**fields, **trial, "out": str(out)}, []), SILENT)
        except Interrupted:
            raise Interrupted(
                "interrupted before anything was written", "run the same command again"
            ) from None
        rows = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return 1 / max(*speeds[1:], 1e-9) if len(speeds) > 1 else 1 / speeds[0]
