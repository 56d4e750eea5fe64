"""`llmctl generate`: continue a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llmctl.engine.generate import generate
from llmctl.engine.sampling import sampler
from llmctl.errors import UserError
from llmctl.kernels.device import DTYPES, pick_device
from llmctl.kernels.threads import use_threads
from llmctl.locate import locate
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import can_fold, is_adapter
from llmctl.model.checkpoint import FILES
from llmctl.model.generation import ids_in
from llmctl.model.open import open_folded, open_model
from llmctl.model.ready import ready
from llmctl.recipe.generate import GenerateRecipe, SamplingSection
from llmctl.stages.text import fitting_tokenizer
from llmctl.talk import Talk
from llmctl.tokenizer.render import Renderer, RenderError
from llmctl.tokenizer.stream import TextStream
from llmctl.tokenizer.template import stop_ids


def run(
    recipe: GenerateRecipe, prompt: str, talk: Talk, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """The continuation: `text` without the prompt, `tokens` the new ids, `tokens_per_second` of decoding.

    Args:
        on_text: called with each bit of text as it is complete.

    Raises UserError: the model or tokenizer cannot be loaded or do not fit, the prompt is empty and
    the model has no BOS, or it leaves no room in the context.
    """
    assert recipe.base is not None
    settings = recipe.generate
    model, tokenizer = open_writer(recipe.base, recipe.device, settings, "generate", talk)
    ids = prompt_ids(tokenizer, prompt, settings.chat, recipe.base)
    return continue_ids(model, tokenizer, ids, settings, talk, on_text)


def open_writer(
    where: str, device: str, settings: SamplingSection, section: str, talk: Talk
) -> tuple[LlmctlForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer, which fit each other; sets the number of threads too.

    Args:
        section: what the recipe calls `settings`.
    """
    tokenizer = fitting_tokenizer(where)
    use_threads(settings.threads, f"{section}.threads", pick_device(device), talk)
    return load_for_generation(where, device, settings.dtype, f"{section}.dtype"), tokenizer


def load_for_generation(
    where: str, device: str, dtype: str, field: str = "generate.dtype"
) -> LlmctlForCausalLM:
    """The model as it is used: adapters folded in where they can be, weights laid out for the device, in the asked precision.

    float16 weights become float32 on a CPU.
    """
    place = pick_device(device)
    if dtype == "float16" and place.type == "cpu":
        raise UserError(
            f"{field}: float16 is far slower than float32 on a CPU", "use bfloat16, float32 or auto"
        )
    folder = locate(where, FILES)
    if is_adapter(folder) and not can_fold(folder):
        return open_model(folder, DTYPES.get(dtype), place)
    open_it = open_folded if is_adapter(folder) else open_model
    model = open_it(folder, DTYPES.get(dtype), place)
    if place.type == "cpu" and model.dtype == torch.float16:
        model = model.float()
    ready(model)
    return model


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, chat: bool, where: str) -> list[int]:
    """The prompt as ids: raw text after BOS, or one user turn through the chat template."""
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{where}: the tokenizer has no chat template", "leave out --chat")
        try:
            ids = Renderer(tokenizer).prompt_ids([{"role": "user", "content": prompt}])
        except RenderError as error:
            raise UserError(f"{where}: {error}", error.hint) from None
        if not ids:
            raise UserError(f"{where}: the chat template writes nothing", "leave out --chat")
        return ids
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    if not ids:
        raise UserError(
            "the prompt is empty, and this model has no BOS token to begin with", "give some text"
        )
    return ids


def continue_ids(
    model: LlmctlForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    settings: SamplingSection,
    talk: Talk,
    on_text: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Generate after `ids` and decode; see `run`."""
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids):,} tokens, but the model's context is {len(ids) + room:,}",
            "shorten the prompt",
        )
    wanted = min(settings.max_new_tokens, room)
    if wanted < settings.max_new_tokens:
        talk.say(f"the context ends after {wanted} new tokens")
    sample = sampler(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    stops = () if settings.ignore_eos else end_ids(model, tokenizer)
    stream = TextStream(tokenizer, ids)
    tokens, speed = written(generate(model, ids, wanted, sample, stops), stream, on_text)
    return {"text": stream.text, "tokens": tokens, "tokens_per_second": speed}


def written(
    made: Iterator[int],
    stream: TextStream,
    on_text: Callable[[str], None] | None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[int], float]:
    """The tokens that are made, and how many a second; their text is told as it is complete.

    Args:
        stopped: asked after every token whether this was the last one.
    """
    tokens: list[int] = []
    started = first = time.perf_counter()
    for token in made:
        if not tokens:
            first = time.perf_counter()
        tokens.append(token)
        text = stream.add(token)
        if on_text is not None and text:
            on_text(text)
        if stopped():
            break
    ended, rest = time.perf_counter(), stream.rest()
    if on_text is not None and rest:
        on_text(rest)
    # the first token waits for the whole prompt; the speed is that of the ones after it
    spent, count = (ended - first, len(tokens) - 1) if len(tokens) > 1 else (ended - started, len(tokens))
    return tokens, round(count / max(spent, 1e-9), 1)


def end_ids(model: LlmctlForCausalLM, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that end a text: those of the model, and those of the tokenizer and its template."""
    return frozenset([*ids_in(model.generation_config.eos_token_id), *stop_ids(tokenizer)])
