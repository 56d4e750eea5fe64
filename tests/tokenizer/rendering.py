"""What the tests of rendering share: renderers over the table of talks.py, and texts that people write."""

from __future__ import annotations

import string
from functools import cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.render import Encoded, Renderer
from tests.tokenizer.talks import MARKED, SPECIAL, TOKENIZERS, unmarked


@cache
def made(kind: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[kind]()


@cache
def renderer(kind: str, template: str, marks: bool = True) -> Renderer:
    """Each has a tokenizer of its own, because the template is a part of it."""
    tokenizer = TOKENIZERS[kind]()
    text = MARKED.get(template, template)
    tokenizer.chat_template = text if marks else unmarked(text)
    return Renderer(tokenizer)


def encoded(rendering: Renderer, messages: list, tools: list | None = None) -> Encoded:
    found = rendering.encode([rendering.render(messages, tools)])[0]
    assert isinstance(found, Encoded), found
    return found


def theirs(rendering: Renderer, messages: list, tools: list | None = None, prompt: bool = False) -> list[int]:
    """What transformers gives."""
    return rendering.tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=False, add_generation_prompt=prompt
    )


def special_in(ids: list[int]) -> list[int]:
    """Special tokens among ids of one of the TOKENIZERS."""
    return [token for token in ids if token < len(SPECIAL)]


every = pytest.mark.parametrize("kind", TOKENIZERS)
templates = pytest.mark.parametrize("template", MARKED)
# what people write, and what trips tokenizers up; no special token
plain = st.lists(
    st.sampled_from(
        ["东村有八户", "😀", "👩‍👩‍👧", "\r\n", "\t", "  ", "\n\n", " ", "'s", "12345", "e\u0301", "ﬁ", "\u00a0", "\u2028",
         "▁", "<0x41>", "{{ x }}", "{% y %}", "<|im_", "|>", "[INST", "\ue0f7", "\ue0f5", "\x00"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.text(string.ascii_letters + string.punctuation + " \n", max_size=8),
    min_size=1, max_size=5,
).map("".join)  # fmt: skip
spoken = plain.filter(lambda text: text.strip() and not any(token in text for token in SPECIAL))
quick = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
