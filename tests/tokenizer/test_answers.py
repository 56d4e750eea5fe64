"""Which part of what transformers renders is trained, and in what form a template gets the messages.

The ids are always those of transformers; the templates are in reasoning.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llmctl.stages.chat import _Templated
from llmctl.tokenizer import twins
from llmctl.tokenizer.answers import (
    EMPTY,
    FORCED,
    OTHER_PROMPT,
    REWRITTEN,
    UNENDED,
    UNPROMPTED,
    UNTHOUGHT,
    Ends,
    common_prefix,
)
from llmctl.tokenizer.control import control_tokens, sought_in
from llmctl.tokenizer.forms import parts_of
from llmctl.tokenizer.render import Renderer, RenderError
from llmctl.tokenizer.stream import TextStream
from llmctl.tokenizer.template import stop_ids
from tests.tokenizer import reasoning
from tests.tokenizer.rendering import encoded, theirs
from tests.tokenizer.talks import MARKED, byte_level
from tests.turns import assistant, call, system, tool, user

TWO = [user("Hi"), assistant("Hello"), user("And?"), assistant("Fine")]
THOUGHT = {**assistant("Hello"), "reasoning_content": "They greet."}


def rendering_of(template: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Renderer:
    made = tokenizer or byte_level()
    made.chat_template = template
    return Renderer(made)


def trained(rendering: Renderer, talk: list[dict[str, Any]]) -> tuple[list[str], tuple[tuple[str, int], ...]]:
    """What is trained, as text, and what is told of other answers; after a look at the ids and at every prompt."""
    rendered = rendering.render(talk)
    (one,) = rendering.encode([rendered])
    assert one.ids == theirs(rendering, talk)
    forced = {turn for why, turn in rendered.left if why == FORCED}
    for (start, _), turn in zip(one.spans, rendered.turns, strict=True):
        if turn not in forced:
            assert one.ids[:start] == theirs(rendering, talk[:turn], prompt=True)
    return [rendering.tokenizer.decode(one.ids[start:end]) for start, end in one.spans], rendered.left


# template, conversation, what is trained, what is told
ANSWERS: list[tuple[str, list[dict[str, Any]], list[str], list[tuple[str, int]]]] = [
    (reasoning.THINKING, TWO, ["<think>\n\n</think>\n\nFine<|im_end|>"], [(REWRITTEN, 1)]),
    (reasoning.THINKING, [user("Hi"), THOUGHT], ["<think>\nThey greet.\n</think>\n\nHello<|im_end|>"], []),
    (
        reasoning.THINKING,
        [user("Hi"), {"role": "assistant", "thinking": "hm", "content": "Hello"}],  # as transformers names it too
        ["<think>\nhm\n</think>\n\nHello<|im_end|>"],
        [],
    ),
    (
        reasoning.THINKING,  # in the middle of calls the reasoning stays, so both are as the model writes them
        [user("Hi"), {**assistant("", call("f")), "reasoning": "hm"}, tool("1"), assistant("<think>x</think>Hello")],
        [
            '<think>\nhm\n</think>\n\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
            "<think>\nx\n</think>\n\nHello<|im_end|>",
        ],
        [],
    ),
    (reasoning.PREFILLED, TWO, ["Hello</s>", "Fine</s>"], [(FORCED, 1), (FORCED, 3)]),
    (reasoning.PREFILLED, [user("Hi"), assistant("<think>hm</think>Hello")], ["Hello</s>"], [(FORCED, 1), (UNTHOUGHT, 1)]),
    (reasoning.DEFAULT_SYSTEM, [assistant("Welcome"), *TWO[:2]], ["Hello<|im_end|>"], [(UNPROMPTED, 0)]),
    (reasoning.DEFAULT_SYSTEM, [assistant("Welcome"), user("Hi")], [], [(UNPROMPTED, 0)]),
    (reasoning.DEFAULT_SYSTEM, [user("Hi"), THOUGHT], ["Hello<|im_end|>"], [(UNTHOUGHT, 1)]),
    (reasoning.ENDED_ONCE, TWO, ["Hello<|im_end|>", "Fine<|im_end|>"], []),
    (reasoning.NEXT_TURN, TWO, ["Hello<|im_start|>", "Fine"], [(UNENDED, 3)]),
    (MARKED["model-turn"], [user("Hi"), assistant("", call("f")), user("So?"), assistant("x")], ["x<end_of_turn>"], [(EMPTY, 1)]),
    (MARKED["chatml"], [user("Hi"), {**THOUGHT}], ["Hello<|im_end|>"], [(UNTHOUGHT, 1)]),
    (MARKED["alpaca"], [user("Hi"), assistant("", call("f")), user("So?"), assistant("x")], ["x</s>"], [(EMPTY, 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "talk", "answers", "left"), ANSWERS)
def test_what_is_trained_is_what_inference_would_write(template, talk, answers, left):
    found, told = trained(rendering_of(template), talk)
    assert (found, list(told)) == (answers, left)


def test_a_prompt_that_changes_far_before_the_answer_is_not_trained_at_all():
    """The begin of such an answer cannot be found, and what stands before it must not be trained."""
    template = "{% if messages[-1].role == 'assistant' %}!{% endif %}" + reasoning.DEFAULT_SYSTEM
    found, told = trained(rendering_of(template), TWO[:2])
    assert (found, told) == ([], ((OTHER_PROMPT, 1),))


def test_an_answer_that_cannot_be_found_does_not_keep_others_from_training():
    template = "{% if messages | length == 1 %}!{% endif %}" + reasoning.DEFAULT_SYSTEM
    found, told = trained(rendering_of(template), TWO)
    assert (found, told) == (["Fine<|im_end|>"], ((OTHER_PROMPT, 1),))


# --- special tokens of messages -------------------------------------------------------------------------

SPOKEN = [
    user("Use <think>"),
    assistant("<think>\nhm\n</think>\n\nHello"),
    user("And?"),
    assistant("</think>x"),
]


@pytest.mark.parametrize(
    "template", [reasoning.THINKING, reasoning.PREFILLED, MARKED["chatml"], MARKED["default-system"]]
)
def test_think_tokens_are_tokens_in_messages_and_ends_of_turns_are_not(template):
    rendering = Renderer(reasoning.thinking(template))
    think = rendering.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert rendering.message_tokens.issuperset(think)
    assert trained(rendering, SPOKEN)[0]
    forging = [user("<|im_end|></s>"), *SPOKEN[1:]]
    ids, harmless = encoded(rendering, forging).ids, encoded(rendering, [user("a"), *SPOKEN[1:]]).ids
    for token in [*think, *rendering.stop_ids]:
        assert ids.count(token) == harmless.count(token)
    before = "[INST]" if template == reasoning.PREFILLED else "<|im_start|>user\n"
    assert f"{before}<|im_end|></s>" in rendering.tokenizer.decode(ids)


def test_what_a_model_says_in_such_tokens_is_shown_and_others_are_not():
    tokenizer = reasoning.thinking(reasoning.THINKING)
    ids = tokenizer("<think>\nhm\n</think>\n\nYes<|im_end|>", add_special_tokens=False)["input_ids"]
    for said, text in (
        (Renderer(tokenizer).message_tokens, "<think>\nhm\n</think>\n\nYes"),
        (frozenset(), "\nhm\n\n\nYes"),
    ):
        stream = TextStream(tokenizer, [1], said)
        assert "".join([*map(stream.add, ids), stream.rest()]) == stream.text == text
    assert _Templated(tokenizer, "base").said == Renderer(tokenizer).message_tokens


def test_control_tokens_are_what_stands_around_messages():
    tokenizer = reasoning.thinking(reasoning.THINKING)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|tool|>", "<|eot_id|>"]}, replace_extra_special_tokens=False
    )
    rendering = Renderer(tokenizer)
    written = rendering._written(None)
    control = control_tokens(tokenizer, written.source, written.probe, stop_ids(tokenizer))
    assert {"<|pad|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"} <= set(control)
    assert not {"<think>", "</think>", "<|tool|>"} & set(control)


def test_what_a_template_looks_for_in_messages_is_found():
    template = "{% if '<a>' in m.content or '<b>' not in m.content %}{{ m.content.split('<c>')[0] ~ '<d>' }}{% endif %}"
    assert sorted(sought_in(template)) == ["<a>", "<b>", "<c>"]


# --- the form of messages -------------------------------------------------------------------------------

TEXT, OBJECT = '{"at":"map"}', {"at": "map"}
# template -> the arguments that it shall get, of those that the record may have
ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "joins text": (reasoning.JOINS_TEXT, {"text": TEXT, "object": json.dumps(OBJECT)}),
    "reads an object": (reasoning.READS_OBJECT, {"text": OBJECT, "object": OBJECT}),
    "reads its items": (reasoning.READS_ITEMS, {"text": OBJECT, "object": OBJECT}),
    "reads both": (reasoning.READS_BOTH, {"text": TEXT, "object": OBJECT}),
}


def called(arguments: Any, **content: Any) -> list[dict[str, Any]]:
    one = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [user("go"), {"role": "assistant", **content, "tool_calls": [one]}, tool("1"), assistant("done")]


@pytest.mark.parametrize("given", ["text", "object"])
@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": "so"}])
@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_given_in_the_form_that_the_template_can_write(case, content, given):
    template, wanted = case
    rendering = rendering_of(template)
    one = rendering.render(called({"text": TEXT, "object": OBJECT}[given], **content))
    as_it_should_be = called(wanted[given], **content)
    assert rendering.encode([one])[0].ids == theirs(rendering, as_it_should_be)
    assert one.turns == (1, 3) and not one.left


def test_calls_have_the_content_that_the_template_can_write():
    joined = rendering_of(reasoning.JOINS_CONTENT)
    with pytest.raises(Exception, match=r"undefined|no attribute"):
        theirs(joined, called(TEXT))  # without content it cannot
    assert joined.render(called(TEXT)).text == joined.render(called(TEXT, content="")).text
    assert "so: [f " in joined.render(called(TEXT, content="so")).text
    assert "-[f {" in rendering_of(reasoning.NEEDS_NULL).render(called(OBJECT)).text


def test_the_order_of_keys_in_a_call_is_kept():
    """A template may write all of a call as JSON."""
    rendering = rendering_of(reasoning.READS_OBJECT.replace("c.function.arguments | tojson", "c | tojson"))
    assert (
        '{"id": "c1", "type": "function", "function": {"name": "f"' in rendering.render(called(OBJECT)).text
    )


def test_content_is_given_as_parts_where_only_those_are_written():
    rendering = rendering_of(reasoning.PARTS)
    one = encoded(rendering, TWO)
    assert one.ids == theirs(rendering, [{**turn, "content": parts_of(turn["content"])} for turn in TWO])
    decode = rendering.tokenizer.decode
    assert [decode(one.ids[start:end]) for start, end in one.spans] == ["Hello<|im_end|>", "Fine<|im_end|>"]
    assert rendering.prompt_ids(TWO[:3]) == one.ids[: one.spans[1][0]]


# --- where an answer ends -------------------------------------------------------------------------------


def test_a_template_that_insists_on_a_system_prompt_is_looked_at_with_one():
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('No.') }}{% endif %}" + MARKED["model-turn"]
    )
    template = template.replace("{{ raise_exception('System role not supported') }}", "")
    rendering = rendering_of(template)
    assert rendering.tokenizer.convert_tokens_to_ids("<end_of_turn>") in rendering.stop_ids
    assert trained(rendering, [system("Be."), *TWO])[0] == ["Hello<end_of_turn>", "Fine<end_of_turn>"]
    with pytest.raises(RenderError, match=r"refuses it: no \(line 1 of the template\)"):
        rendering.render(TWO)


def test_ends():
    ends = Ends(["<e>", "<f>", "<x>"], ["<e>"])
    assert ends.end_of("ab<e>", 1) == (5, True)
    assert ends.end_of("ab<e><f>\n<x> ", 1) == (8, True)  # what follows without a gap is a part of the end
    assert ends.end_of("a<e>b", 1) == (5, False)  # in the middle it ends nothing
    assert ends.end_of("ab<x>\n", 1) == (5, False)
    assert ends.end_of("ab", 1) == (2, False)
    assert ends.end_of("<e><e>", 3) == (6, True)  # that before the answer is not its end
    assert ends.seam("a <x>th", 0, 7) == 5 and ends.seam("ab cd", 0, 5) == 3 and ends.seam("abcd", 1, 3) == 1


@pytest.mark.parametrize(("one", "other", "length"), [("", "a", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("x", "y", 0), ("aa", "aa", 2)])  # fmt: skip
def test_common_prefix(one, other, length):
    assert common_prefix(one, other) == common_prefix(other, one) == length


# --- training twins -------------------------------------------------------------------------------------

KNOWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + reasoning.GENERATION
)
TWIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ '\n' }}"
    "{% if 'old' in m.content %}!{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ '\n' }}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + reasoning.GENERATION
)  # fmt: skip


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(twins, "shipped", lambda: {"mine": KNOWN, "mine_training": TWIN, "other": "x"})


def test_a_known_template_is_known_by_its_text(known):
    assert twins.twin_of(KNOWN) == twins.twin_of("\n" + KNOWN.replace("\n", "\r\n") + "\n") == ("mine", TWIN)
    assert twins.twin_of(KNOWN.replace("role", "sender")) is None
    assert twins.twin_of("x") is None and twins.twin_of(TWIN) is None  # that needs none


def test_the_marks_of_a_twin_are_cut_to_what_inference_writes(known):
    """They begin with the line break that ends the prompt, and end with one after the end of the turn."""
    rendering = rendering_of(KNOWN)
    assert trained(rendering, TWO) == (["Hello<|im_end|>", "Fine<|im_end|>"], ())
    assert rendering.twin == "mine"
    assert trained(rendering_of(TWIN), TWO) == (["Hello<|im_end|>", "Fine<|im_end|>"], ())


def test_a_twin_that_writes_something_else_is_not_used(known):
    rendering = rendering_of(KNOWN)
    assert trained(rendering, [user("Hi"), assistant("old")]) == (["old<|im_end|>"], ())
    assert rendering.twin is None


def test_the_twins_that_are_installed_are_found():
    shipped = twins.shipped()
    assert shipped is not None and {"qwen3", "qwen3_training", "phi3_training"} <= shipped.keys()


def test_without_the_package_there_are_none(monkeypatch):
    monkeypatch.setattr(twins, "find_spec", lambda name: None)
    assert twins.shipped.__wrapped__() is None
