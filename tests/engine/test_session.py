"""A session that keeps its memory says what a fresh one says, and runs only what is new."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmctl.engine.generate import generate
from llmctl.engine.session import Session
from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import new_model
from llmctl.recipe.model import ModelSection

CONTEXT = 64
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
VARIANTS = {"full": {}, "sliding": {"pattern": ["full", "sliding"], "sliding_window": 5}}


def likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LlmctlForCausalLM:
    return new_model(ModelSection(**SIZES, **VARIANTS[request.param]), seed=1)


@pytest.fixture
def ran(model: LlmctlForCausalLM) -> Iterator[list[int]]:
    """How many tokens each pass ran through the stack."""
    lengths: list[int] = []

    def note(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        lengths.append(given[0].shape[1])

    handle = model.model.layers[0].register_forward_pre_hook(note)
    yield lengths
    handle.remove()


def test_turns_are_those_of_fresh_generations_and_only_new_ids_are_run(
    model: LlmctlForCausalLM, ran: list[int]
) -> None:
    session, prompt = Session(model), [3, 1, 4, 1, 5]
    for turn in range(3):
        expected = list(generate(model, prompt, 8, likeliest))
        ran.clear()
        held = len(session.ids)
        assert list(session.generate(prompt, 8, likeliest)) == expected
        assert ran == [len(prompt) - held, *[1] * 7]
        # the last token was said but never read
        assert session.ids == [*prompt, *expected[:-1]]
        prompt = [*prompt, *expected, 20 + turn, 9, 2]


def test_a_prompt_that_departs_keeps_what_is_shared(model: LlmctlForCausalLM, ran: list[int]) -> None:
    session = Session(model)
    list(session.generate([3, 1, 4, 1, 5], 6, likeliest))
    other = [3, 1, 4, 7, 7, 7]
    expected = list(generate(model, other, 6, likeliest))
    ran.clear()
    assert list(session.generate(other, 6, likeliest)) == expected
    assert ran[0] == 3


def test_the_same_prompt_again_runs_its_last_token(model: LlmctlForCausalLM, ran: list[int]) -> None:
    session = Session(model)
    first = list(session.generate([3, 1, 4], 5, likeliest))
    ran.clear()
    assert list(session.generate([3, 1, 4], 5, likeliest)) == first
    assert ran == [1] * 5


def test_a_stop_id_ends(model: LlmctlForCausalLM) -> None:
    said = list(generate(model, [3, 1, 4], 9, likeliest))
    stop = said[4]
    session = Session(model)
    assert list(session.generate([3, 1, 4], 9, likeliest, {stop})) == said[: said.index(stop) + 1]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_interruption_inside_a_pass_harms_nothing(model: LlmctlForCausalLM, layer: int) -> None:
    """The layers before it have written the token, those after it have not."""
    session, prompt = Session(model), [3, 1, 4, 1, 5]
    running = session.generate(prompt, 20, likeliest)
    said = [next(running) for _ in range(4)]

    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    handle.remove()
    after = [*prompt, *said, 8, 8]
    assert list(session.generate(after, 8, likeliest)) == list(generate(model, after, 8, likeliest))


def test_memory_grows_to_the_context_and_no_further(model: LlmctlForCausalLM) -> None:
    session, sizes = Session(model), []
    for length in (4, 6, 20, CONTEXT - 4):
        prompt = [(7 * place) % 60 for place in range(length)]
        assert list(session.generate(prompt, 4, likeliest)) == list(generate(model, prompt, 4, likeliest))
        sizes.append(session._states[0].parts[0].shape[2])
    assert sizes == [8, 16, 32, CONTEXT]
