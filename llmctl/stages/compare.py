"""`llmctl compare`: is the second model the first one still?"""

from __future__ import annotations

from typing import Any

import torch

from llmctl.data.batches import eval_batches
from llmctl.engine.generate import generate
from llmctl.engine.sampling import likeliest
from llmctl.errors import UserError, named_in
from llmctl.evaluate.parity import parity
from llmctl.kernels.device import Compute, pick_compute
from llmctl.kernels.threads import use_threads
from llmctl.model import LlmctlForCausalLM
from llmctl.model.open import open_config, open_model
from llmctl.recipe.tune import CompareRecipe, CompareRows, SftData
from llmctl.stages.gate import out_of_bounds, rounded_dtype, similar_kl
from llmctl.stages.generate import end_ids
from llmctl.stages.rows import TalkRows, read_rows, require_data
from llmctl.stages.text import fitting_tokenizer, open_tokenizer, pad_id_of, row_length
from llmctl.talk import SILENT, Talk
from llmctl.tokenizer.choose import OWN, choose_template
from llmctl.tokenizer.load import fingerprint
from llmctl.tokenizer.template import template_hash

FEW_DECIDED = 0.05  # share of decided tokens below which agreement on them proves nothing
ROW = 512  # tokens in a row where the recipe sets none


def run(recipe: CompareRecipe, talk: Talk) -> dict[str, Any]:
    """Figures of `Parity`, stop rates, and answers side by side; `failed` says what is out of bounds.

    `allowed_kl` is the divergence that was allowed.

    Raises UserError: no data, models that cannot be opened, two tokenizers that differ.
    """
    settings = recipe.compare
    require_data(settings.data, "compare on")
    assert recipe.base is not None and recipe.other is not None
    compute = pick_compute(recipe.device, settings.dtype, "compare.dtype")
    use_threads(settings.threads, "compare.threads", compute.device, talk)
    rows = shared_rows(recipe.base, recipe.other, settings, talk)
    a, b = (open_model(where, compute.dtype, compute.device) for where in (recipe.base, recipe.other))
    noise = rounded_dtype(recipe.base, recipe.other)
    found = held_together(a, b, rows, recipe.base, settings, compute, noise, talk)
    allowed = similar_kl(found) if settings.max_kl is None else settings.max_kl
    return found | {"allowed_kl": allowed, "failed": out_of_bounds(found, settings.min_top1, allowed)}


@named_in("compare")
def shared_rows(a: str, b: str, settings: CompareRows, talk: Talk) -> TalkRows:
    """The data as rows for both models. Raises UserError if they would not read the same ids."""
    one, other = (fitting_tokenizer(where) for where in (a, b))
    if fingerprint(one) != fingerprint(other):
        raise UserError(
            f"{a} and {b} have different tokenizers, so their tokens cannot be compared",
            "`llmctl eval` measures each in bits per byte, which compares",
        )
    choice = choose_template(one, OWN)
    if choice.said:
        talk.say(choice.said)
    if other.chat_template is not None and template_hash(one) != template_hash(other):
        talk.say(f"the chat templates differ: both models read the rows through that of {a}")
    longest = min(open_config(where).max_position_embeddings for where in (a, b))
    length = compared_length(settings, longest)
    data = SftData(
        train=settings.data,
        text_field=settings.text_field,
        columns=settings.columns,
        overlong="truncate",
        packing=False,
    )
    return read_rows(settings.data, data, one, length, talk, measured=True)


def compared_length(settings: CompareRows, longest: int) -> int:
    """Tokens in a row; short ones where the recipe leaves it open, so that a batch is soon read."""
    length = row_length(settings.max_length, longest, "compare.max_length")
    return length if settings.max_length else min(length, ROW)


def held_together(
    a: LlmctlForCausalLM,
    b: LlmctlForCausalLM,
    rows: TalkRows,
    where: str,
    settings: CompareRows,
    compute: Compute,
    rounded: torch.dtype | None = None,
    talk: Talk = SILENT,
) -> dict[str, Any]:
    """Both models on the same rows and prompts; see `run`.

    Args:
        where: the model whose tokenizer made the rows.
        rounded: see `parity`; left out where the models compute in less than float32 themselves.
    """
    tokenizer = open_tokenizer(where)
    choose_template(tokenizer, OWN)
    batches = eval_batches(
        rows.laid,
        batch_size=settings.batch_size,
        pad_id=pad_id_of(tokenizer),
        max_rows=settings.max_rows,
    )
    rounded = rounded if compute.dtype == torch.float32 else None
    made = parity(a, b, batches, compute, rounded=rounded, max_tokens=settings.max_tokens, talk=talk)
    found: dict[str, Any] = made.figures()
    found["rows"] = len(made.row.unique())
    if found.get("decided", 1.0) < FEW_DECIDED:
        talk.say(
            f"rounding alone decides {1 - found['decided']:.0%} of the tokens: agreement says little here"
        )
    stops = [end_ids(model, tokenizer) for model in (a, b)]
    answers = []
    for prompt, reference in rows.prompts(settings.answers):
        said = [
            _answer(model, prompt, settings.max_new_tokens, ends, compute)
            for model, ends in zip((a, b), stops, strict=True)
        ]
        answers.append(
            {
                "prompt": tokenizer.decode(prompt),
                "reference": tokenizer.decode(reference),
                "a": tokenizer.decode(said[0]),
                "b": tokenizer.decode(said[1]),
                "stopped_a": bool(said[0]) and said[0][-1] in stops[0],
                "stopped_b": bool(said[1]) and said[1][-1] in stops[1],
            }
        )
    count = len(answers)
    for side in ("a", "b"):
        found[f"stop_rate_{side}"] = sum(one[f"stopped_{side}"] for one in answers) / count if count else None
    found["same_answers"] = sum(one["a"] == one["b"] for one in answers) / count if count else None
    return found | {"answers": answers}


def _answer(
    model: LlmctlForCausalLM, prompt: list[int], longest: int, stops: frozenset[int], compute: Compute
) -> list[int]:
    room = min(longest, model.config.max_position_embeddings - len(prompt))
    with compute.autocast():
        return list(generate(model, prompt, room, likeliest, stops)) if room > 0 else []
