"""What a conversation becomes: the ids that transformers gives, and exactly the assistant's part marked.

The tables of templates and tokenizers are in talks.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from llmctl.tokenizer.answers import EMPTY, REWRITTEN
from llmctl.tokenizer.render import Encoded, PlainText, Rendered, Renderer, RenderError
from llmctl.tokenizer.spans import Coder
from tests.tokenizer.rendering import (
    encoded,
    every,
    made,
    quick,
    renderer,
    special_in,
    spoken,
    templates,
    theirs,
)
from tests.tokenizer.talks import MARKED, REWRITING, byte_level
from tests.turns import assistant, call, system, tool, user

TALK = [
    user("Where is  the miller's old map?"),
    assistant("東 of the river,\n\n  I think."),
    user("\tOh?\r\n"),
    assistant(" yes! 12 miles 😀"),
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "It looks.", "parameters": {}}}]
LOST = "the end of the prompt is other tokens once the answer follows it"


# --- ids and masks ------------------------------------------------------------------------------------


@every
@templates
@quick
@given(said=st.lists(spoken, min_size=2, max_size=6))
def test_ids_are_those_of_transformers_and_marks_equal_increments(kind, template, said):
    """For ordinary text; an answer's white space may join the prompt's."""
    talk = [(user, assistant)[turn % 2](text) for turn, text in enumerate(said[: len(said) // 2 * 2])]
    marked, plain = renderer(kind, template), renderer(kind, template, marks=False)
    rendered = marked.render(talk)
    assert plain.render(talk) == rendered
    one = marked.encode([rendered])[0]
    assert one == plain.encode([rendered])[0]
    assert one.ids == theirs(marked, talk)
    if one.joined:
        assert template == "default-system"  # the only one that trims nothing
        return
    assert len(one.spans) == len(talk) // 2
    for turn, (start, end) in zip(range(1, len(talk), 2), one.spans, strict=True):
        prompt = marked.prompt_ids(talk[:turn])
        assert prompt == one.ids[:start] == theirs(marked, talk[:turn], prompt=True)
        assert one.ids[end - 1] in marked.stop_ids
        through = marked.render(talk[: turn + 1])
        begin, finish = through.spans[-1]
        assert encoded(marked, talk[: turn + 1]).ids[start:end] == one.ids[start:end]
        assert talk[turn]["content"].strip() in through.text[begin:finish]


@every
@templates
def test_a_conversation_is_marked_where_the_assistant_writes(kind, template):
    talk = (
        TALK
        if template != "default-system"
        else [turn | {"content": turn["content"].strip()} for turn in TALK]
    )
    rendering = renderer(kind, template)
    one = encoded(rendering, talk)
    ends = {"instruction": "</s>", "alpaca": "</s>", "headers": "<|eot_id|>", "model-turn": "<end_of_turn>"}
    answers = [rendering.tokenizer.decode(one.ids[start:end]).strip() for start, end in one.spans]
    end = ends.get(template, "<|im_end|>")
    assert answers == [turn["content"].strip() + end for turn in talk if turn["role"] == "assistant"]


@templates
def test_system_turns(template):
    rendering, talk = renderer("byte-level", template), [system("Be brief."), *TALK[:2]]
    if template == "model-turn":
        with pytest.raises(RenderError, match="refuses it: system role not supported"):
            rendering.render(talk)
        return
    one = encoded(rendering, talk)
    assert one.ids == theirs(rendering, talk)
    assert "Be brief." in rendering.tokenizer.decode(one.ids[: one.spans[0][0]])
    assert one == renderer("byte-level", template, marks=False).encode([rendering.render(talk)])[0]


def test_many_texts_at_once_are_each_as_alone():
    rendering = renderer("byte-level", "chatml")
    talks = [TALK[:2], [user("<|im_end|>"), assistant("<s>")], TALK, [user("a"), assistant("b")]] * 3
    rendered = [rendering.render(talk) for talk in talks]
    assert rendering.encode(rendered) == [rendering.encode([one])[0] for one in rendered]


def test_roles_that_must_alternate():
    with pytest.raises(RenderError) as caught:
        renderer("byte-level", "instruction").render([user("a"), user("b"), assistant("c")])
    assert str(caught.value) == (
        "the chat template refuses it: roles must alternate: user, assistant, user, assistant"
        " (line 3 of the template)"
    )
    assert caught.value.hint == "mend the record, or choose another template with --template"


@pytest.mark.parametrize(
    "fault", ["{{ messages[0].content.index('zz') }}", "{{ 1 / 0 }}", "{{ none + 'a' }}", "{{ [].pop() }}"]
)
def test_an_error_inside_the_template_is_told_and_not_a_crash(fault):
    # only for longer talks, so that the template can be taken for good
    rendering = renderer(
        "byte-level", MARKED["chatml"] + "{% if messages | length > 2 %}" + fault + "{% endif %}"
    )
    with pytest.raises(RenderError, match="the chat template refuses it: "):
        rendering.render(TALK)


# --- what a model would see at inference ----------------------------------------------------------------


@pytest.mark.parametrize("spread", [1, 40])
def test_a_token_that_straddles_prompt_and_answer_is_not_trained(spread):
    """Whether the prompt's end is near a special token or far from it; the rest of the answer is."""
    joined = "{% for m in messages %}{{ m.role + ': ' }}" + (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for kind in ("byte-level", "trimming", "metaspace"):
        rendering = renderer(kind, "{{ bos_token }}" + joined)
        talks = [[user("a b" * spread), assistant("maps!")], [user("a b" * spread), assistant("12")]]
        first, second = rendering.encode([rendering.render(talk) for talk in talks])
        # ` maps` is a token, and ` 1` is none: digits stay by themselves
        assert [one.ids for one in (first, second)] == [theirs(rendering, talk) for talk in talks]
        (start, end), decode = first.spans[0], rendering.tokenizer.decode
        straddles = "m" if kind == "metaspace" else "maps"
        assert first.joined == 1 and decode(first.ids[start:end]) == "maps!</s>".removeprefix(straddles)
        assert decode(first.ids[:start]).endswith(f"assistant: {straddles}")
        if kind != "metaspace":
            start, end = second.spans[0]
            assert second.joined == 0 and decode(second.ids[start:end]) == "12</s>"


def test_a_prompt_that_changes_without_straddling_loses_nothing_of_the_answer():
    """GPT-2's own pattern cuts `\\n\\n` in two before a word, and leaves it whole at the end."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.chat_template = MARKED["headers"]
    rendering = Renderer(tokenizer)
    talk = [user("a"), assistant("b")]
    found = encoded(rendering, talk)
    assert found.ids == theirs(rendering, talk) and found.joined == 1
    assert tokenizer.decode(found.ids[slice(*found.spans[0])]) == "b<|eot_id|>"
    assert theirs(rendering, talk[:1], prompt=True) != found.ids[: found.spans[0][0]]


def test_an_end_that_joins_the_next_turn_is_not_trained():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    rendering = renderer("byte-level", template)
    found = encoded(rendering, [user("a"), assistant("old"), user("maps")])
    assert found.joined == 1
    assert rendering.tokenizer.decode(found.ids[slice(*found.spans[0])]) == "old"


@pytest.mark.parametrize("marks", [True, False])
def test_of_a_template_that_rewrites_earlier_turns_the_last_answer_is_trained(marks):
    rendering = renderer("byte-level", REWRITING, marks)
    thought = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("d")]
    one = encoded(rendering, thought[:2])
    assert rendering.tokenizer.decode(one.ids[one.spans[0][0] :]) == "<think>hm</think>b<|im_end|>\n"
    rendered = rendering.render(thought)
    assert (rendered.turns, rendered.left) == ((3,), ((REWRITTEN, 1),))
    assert encoded(rendering, thought).ids == theirs(rendering, thought)
    plain = [user("a"), assistant("b"), user("c"), assistant("d")]  # nothing to rewrite
    assert rendering.render(plain).turns == (1, 3)


def test_completions_are_text_and_their_prompt_begins_the_whole():
    tokenizer = made("byte-level")
    texts = [("It's the old", " maps </s>"), ("a\n", "<|im_end|>"), ("", "b"), ("the old ", "maps")]
    spanned = [Rendered(a + b, ((len(a), len(a + b)),)) for a, b in texts]
    *found, last = PlainText(tokenizer).encode(spanned)
    for one, (prompt, completion) in zip(found, texts, strict=False):
        ((start, end),) = one.spans
        assert not special_in(one.ids)
        assert (tokenizer.decode(one.ids[:start]), tokenizer.decode(one.ids[start:])) == (prompt, completion)
        assert end == len(one.ids)
    assert isinstance(last, RenderError) and str(last) == LOST
    assert last.hint == "let the answer begin with the white space that the prompt ends with"


# --- tools --------------------------------------------------------------------------------------------

CALLED = [user("look"), assistant("", call("look", at="map")), tool("here"), assistant("It is here.")]


@pytest.mark.parametrize("template", ["chatml", "headers"])
@pytest.mark.parametrize("marks", [True, False])
def test_tools_and_calls_are_kept(template, marks):
    rendering = renderer("byte-level", template, marks)
    one = encoded(rendering, CALLED, TOOLS)
    assert one.ids == theirs(rendering, CALLED, TOOLS)
    assert "It looks." in rendering.tokenizer.decode(one.ids[: one.spans[0][0]])
    start, end = one.spans[0]
    assert '{"name": "look", "arguments": {"at": "map"}}' in rendering.tokenizer.decode(one.ids[start:end])
    assert "here" in rendering.tokenizer.decode(one.ids[end : one.spans[1][0]])


@pytest.mark.parametrize("template", ["default-system", "model-turn"])
def test_tools_and_calls_that_are_lost_are_told_and_such_answers_not_trained(template):
    """`default-system` writes the word markdown, which is not the name of a tool."""
    rendering = renderer("byte-level", template)
    assert encoded(rendering, TALK[:2], TOOLS).ids == theirs(rendering, TALK[:2], TOOLS)
    assert list(rendering.unwritten(TALK[:2], TOOLS)) == ["tools"]
    called = [*CALLED[:2], user("and?"), CALLED[3]]
    rendered = rendering.render(called)
    assert (rendered.turns, rendered.left) == ((3,), ((EMPTY, 1),))
    assert list(rendering.unwritten(called, None)) == ["calls of tools"]
    assert encoded(rendering, called).ids == theirs(rendering, called)


# --- the tokenizer itself -------------------------------------------------------------------------------


def test_settings_of_the_tokenizer_are_left_alone_and_do_nothing():
    rendering = renderer("byte-level", "chatml")
    wanted = encoded(rendering, TALK)
    backend = rendering.tokenizer.backend_tokenizer
    backend.enable_truncation(5, stride=1, strategy="only_first", direction="left")
    backend.enable_padding(length=50, pad_id=3, direction="left")
    before = (backend.truncation, backend.padding, backend.encode_special_tokens)
    try:
        assert encoded(rendering, TALK) == wanted
        assert encoded(rendering, [user("<s>"), assistant("</s>")]).ids
        assert len(rendering.prompt_ids(TALK[:1])) > 5
        assert (backend.truncation, backend.padding, backend.encode_special_tokens) == before
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_two_threads_do_not_see_each_others_settings():
    """One reads special tokens as tokens, the other as text, by the same tokenizer."""
    rendering = renderer("byte-level", "chatml")
    spelled, backend = [Rendered("<s>a</s>" * 50, ())] * 50, rendering.tokenizer.backend_tokenizer
    coders = [Coder(backend), Coder(backend, special=False)]
    alone = [coder.ids(spelled) for coder in coders]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(coder.ids, spelled) for _ in range(20) for coder in coders]
        assert all(one.result() == alone[number % 2] for number, one in enumerate(found))


def test_a_special_token_that_other_text_becomes_too_does_not_move_the_marks():
    """The unknown token stands for many things, so its number in ids says nothing of its places in the text."""
    vocab = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]"])
    text = "a x y[UNK] b a"
    found = Coder(tokenizer).encode([Rendered(text, ((11, 12), (11, len(text))))])[0]
    assert found == Encoded([1, 0, 0, 0, 2, 1], ((4, 5), (4, 6)))


def test_no_template_is_a_programmers_error():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Renderer(made("byte-level"))


def test_texts_without_spans_are_encoded_too():
    assert PlainText(made("byte-level")).encode([]) == []
    assert Renderer.encode(renderer("byte-level", "chatml"), [Rendered("a", ())])[0].spans == ()
