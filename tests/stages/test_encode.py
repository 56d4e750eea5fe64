"""Examples as rows: what is trained of each shape, and every way in which a template would teach something else.

`check` is given a template made for each fault; the text of the error and its place are compared whole.
"""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from llmctl.data.formats import Example
from llmctl.data.shapes import Completion, Conversation, Labelled, Preference, Shape, Text
from llmctl.data.statistics import BATCH
from llmctl.errors import UserError
from llmctl.stages.encode import COMPARED, Encoder, Row
from llmctl.stages.pairs import encoded_pairs
from tests.tokenizer.talks import MARKED, byte_level, metaspace, unmarked
from tests.turns import assistant, call, system, tool, user

TALK = [user("It's old?"), assistant("No."), user("Two  maps?"), assistant("12 maps")]
HINT = "choose another with --template"


def example(shape: Shape, line: int = 7, format: str = "messages", column: int = 0) -> Example:
    return Example(shape, format, "talks.jsonl", line, column)


def encoder(template: str, tokenizer: PreTrainedTokenizerFast | None = None, mask: bool = True) -> Encoder:
    tokenizer = tokenizer or byte_level()
    tokenizer.chat_template = MARKED.get(template, template)
    return Encoder(tokenizer, mask)


def one(encoding: Encoder, shape: Shape) -> Row:
    (row,) = encoding.rows([example(shape)])
    assert row.place == "talks.jsonl:7"
    return row


def ids(encoding: Encoder, text: str) -> list[int]:
    return encoding.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- shapes -------------------------------------------------------------------------------------------


def test_a_conversation_trains_its_answers_and_their_ends():
    encoding = encoder("chatml")
    row = one(encoding, Conversation(TALK))
    prompt = ids(encoding, "<s><|im_start|>user\nIt's old?<|im_end|>\n<|im_start|>assistant\n")
    answer = ids(encoding, "No.<|im_end|>")
    between = ids(encoding, "\n<|im_start|>user\nTwo  maps?<|im_end|>\n<|im_start|>assistant\n")
    last = ids(encoding, "12 maps<|im_end|>")
    assert row.ids == [*prompt, *answer, *between, *last, *ids(encoding, "\n")]
    first, second = len(prompt), len(prompt + answer + between)
    assert row.spans == ((first, first + len(answer)), (second, second + len(last)))
    assert not row.is_text


def test_a_completion_is_text_between_the_ends_without_a_template():
    encoding = Encoder(byte_level())  # it has no template, and needs none
    row = one(encoding, Completion("It's <s>", " old maps"))
    prompt, answer = ids(encoding, "It's <s>"), ids(encoding, " old maps")
    assert 1 in prompt  # as a token, that is
    prompt = encoding.tokenizer.backend_tokenizer.encode("It's <").ids + ids(encoding, "s>")
    assert row.ids == [1, *prompt, *answer, 2]
    assert row.spans == ((1 + len(prompt), len(row.ids)),)


def test_a_text_is_trained_whole():
    encoding = Encoder(byte_level())
    row = one(encoding, Text("old maps"))
    assert row == Row([1, *ids(encoding, "old maps"), 2], ((0, len(row.ids)),), "talks.jsonl:7", is_text=True)


def test_a_tokenizer_without_ends_adds_none():
    bare = byte_level()
    bare.bos_token = bare.eos_token = None
    encoding = Encoder(bare)
    assert one(encoding, Text("old")).ids == ids(encoding, "old")
    assert one(encoding, Completion("old", " maps")).spans == ((1, 2),)


def test_without_a_mask_the_prompt_is_trained_up_to_the_last_end():
    encoding = encoder("chatml", mask=False)
    row = one(encoding, Conversation(TALK))
    masked = one(encoder("chatml"), Conversation(TALK))
    assert row.ids == masked.ids and row.spans == ((0, masked.spans[-1][1]),)
    plain = one(encoding, Completion("old", " maps"))
    assert plain.spans == ((0, len(plain.ids)),)


def test_tools_and_calls_are_part_of_the_row():
    encoding = encoder("chatml")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    talk = [system("Go."), user("?"), assistant("", call("look", at=1)), tool("here"), assistant("There.")]
    row = one(encoding, Conversation(talk, tools))
    said = [encoding.tokenizer.decode(row.ids[start:end]) for start, end in row.spans]
    assert said == [
        '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call><|im_end|>', "There.<|im_end|>",
    ]  # fmt: skip
    prompt = encoding.tokenizer.decode(row.ids[: row.spans[0][0]])
    assert "Go.\n\nYou can call" in prompt and '"name": "look"' in prompt


def test_shapes_may_be_mixed_and_stay_in_order():
    encoding = encoder("chatml")
    shapes = [Text("a"), Conversation(TALK), Completion("b", " c"), Conversation(TALK[:2]), Text("d")]
    found = [example(shapes[n % 5], line=n, format=f"f{n % 5}") for n in range(BATCH + 9)]
    rows = list(encoding.rows(found))
    assert [row.place for row in rows] == [one.place for one in found]
    alone = [one(encoder("chatml"), shape) for shape in shapes]
    for number, row in enumerate(rows):
        assert (row.ids, row.spans, row.is_text) == (
            alone[number % 5].ids,
            alone[number % 5].spans,
            alone[number % 5].is_text,
        )
    assert sum(encoding.formats.values()) == len(found) and encoding.formats["f0"] == 105


@pytest.mark.parametrize(
    ("shape", "message", "hint"),
    [
        (
            Preference([], [assistant("a")], [assistant("b")]),
            "a record of preferences (`x`), not of one answer",
            "use it with `llmctl reward` or `llmctl dpo`",
        ),
        (
            Labelled([], [assistant("a")], True),
            "an answer with a label (`x`), not one to learn",
            "`llmctl score` reads these",
        ),
    ],
)
def test_records_of_another_kind_are_told_where_they_belong(shape, message, hint):
    with pytest.raises(UserError) as caught:
        list(encoder("chatml").rows([example(Text("a")), example(shape, 9, "x")]))
    assert (caught.value.message, caught.value.hint) == (f"talks.jsonl:9: {message}", hint)


# --- labels are places --------------------------------------------------------------------------------


def test_an_answer_that_repeats_the_prompt_is_trained_and_the_prompt_is_not():
    said = "old maps"
    encoding = encoder("model-turn")
    row = one(encoding, Conversation([user(said), assistant(said), user(said), assistant(said)]))
    words = ids(encoding, said)
    starts = [at for at in range(len(row.ids)) if row.ids[at : at + len(words)] == words]
    assert len(starts) == 4
    assert row.spans == tuple((at, at + len(words) + 1) for at in starts[1::2])


@pytest.mark.parametrize("template", ["chatml", "headers", "instruction"])
def test_end_and_padding_being_one_token_changes_nothing(template):
    """The end of a question is masked and the end of an answer is trained, though both are the padding."""
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token = {"chatml": "<|im_end|>", "headers": "<|eot_id|>"}.get(
        template, "</s>"
    )
    talk = [user("old"), assistant("</s><|im_end|><|eot_id|>"), user("x"), assistant("maps")]
    row, before = (one(encoder(template, each), Conversation(talk)) for each in (tokenizer, byte_level()))
    assert row == before
    assert [row.ids[end - 1] for _, end in row.spans] == 2 * [tokenizer.pad_token_id]
    inside = [token for start, end in row.spans for token in row.ids[start : end - 1]]
    assert tokenizer.pad_token_id not in inside  # what an answer spells out is text


# --- faults of a template -------------------------------------------------------------------------------

TURN = "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
REST = "{% endif %}{% endfor %}"
MARKS = "{% generation %}{{ m.content }}</s>{% endgeneration %}"
FAULTS: dict[str, tuple[str, str, str]] = {
    "answer left out": (TURN + REST, "no trained token in the row", f"the chat template leaves the answer out; {HINT}"),
    "empty marks": (
        TURN + "{% generation %}{% endgeneration %}{{ m.content }}</s>" + REST,
        "no trained token in the row",
        f"the chat template leaves the answer out; {HINT}",
    ),
    "end outside the marks": (
        TURN + "{% generation %}{{ m.content }}{% endgeneration %}</s>" + REST,
        "the end token `</s>` after an answer is not trained",
        "put it inside the template's {% generation %} marks",
    ),
    "end that does not stop": (
        TURN + "{% generation %}{{ m.content }}\n{% raw %}\n{% endraw %}{% endgeneration %}" + REST,
        "an answer ends with `\\n\\n`, which does not stop generation",
        f"the template must end an answer with a special token; {HINT}",
    ),
    "no end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
        "an answer ends with `.`, which does not stop generation",
        f"the template must end an answer with a special token; {HINT}",
    ),
    "two BOS": (
        "{{ bos_token }}<s>" + TURN + MARKS + REST,
        "the row begins with two BOS tokens",
        "take one of them out of the chat template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS.values(), ids=[name.replace(" ", "-") for name in FAULTS])
def test_faults_of_a_template_are_told_with_the_place(case):
    template, message, hint = case
    talk = [*TALK[:3], assistant("maps")]
    with pytest.raises(UserError) as caught:
        list(encoder(template).rows([example(Conversation(talk), 12, column=5)]))
    assert caught.value.message == f"talks.jsonl:12:5: {message}"
    assert caught.value.hint == hint
    # and as the answers of a pair
    pair = Preference(talk[:1], talk[1:], [*talk[1:3], assistant("other")])
    with pytest.raises(UserError) as caught:
        list(encoded_pairs(encoder(template), [example(pair, 12, column=5)]))
    assert caught.value.message.startswith(f"talks.jsonl:12:5: {message[:40]}")


THINKS = "{% if add_generation_prompt %}<think>\n{% endif %}"
FORCED_LINE = (
    "2 answers trained after a prompt that inference does not render: with this chat template no answer of the record "
    "has another one"
)
# template -> what is trained of the talk, and what is said of it
ACCEPTED: dict[str, tuple[str, list[str], list[str]]] = {
    "one answer marked": (
        TURN + "{% if loop.last %}" + MARKS + "{% else %}{{ m.content }}</s>{% endif %}" + REST,
        ["maps</s>"],
        ["1 answer not trained: it is outside the `generation` marks of the chat template"],
    ),
    "other prompt": (TURN + MARKS + REST + THINKS, ["No.</s>", "maps</s>"], [FORCED_LINE]),
    "other prompt without marks": (
        unmarked(TURN + MARKS + REST) + THINKS, ["No.</s>", "maps</s>"], [FORCED_LINE]
    ),
    "joined": (
        TURN + "{% generation %}{{ m.content }}!</s>{% endgeneration %}" + REST.replace(
            "{% endif %}", "{% endif %}{% if m.role == 'user' %} {% endif %}"
        ),
        ["No.!</s>", "!</s>"],
        ["1 answer trained from its second token on: the first belongs to the end of the prompt too"],
    ),
    "ended by the next turn": (
        TURN + "{{ m.content }}" + REST,
        ["No.[INST]", "maps"],
        ["1 answer trained without an end: the chat template writes none that stops generation"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=[name.replace(" ", "-") for name in ACCEPTED])
def test_what_transformers_renders_is_trained_as_far_as_it_can_be_and_told(case):
    template, answers, notes = case
    talk = [*TALK[:3], assistant("maps")]
    encoding = encoder(template)
    row = one(encoding, Conversation(talk))
    assert row.ids == encoding.tokenizer.apply_chat_template(talk, return_dict=False)
    assert [encoding.tokenizer.decode(row.ids[start:end]) for start, end in row.spans] == answers
    assert list(encoding.notes()) == notes


def test_a_good_template_passes_where_the_faulty_ones_do_not():
    row = one(encoder(TURN + MARKS + REST), Conversation(TALK))
    assert len(row.spans) == 2


@pytest.mark.parametrize("marks", [True, False])
def test_a_prompt_that_differs_late_in_the_data_is_found(marks):
    """Templates branch on what is said, too: long after the first rows of the kind."""
    odd = TURN + MARKS + REST + "{% if add_generation_prompt and 'odd' in messages[-1].content %}!{% endif %}"
    found = [example(Conversation([user("old"), assistant("a")]), line) for line in range(1, 4 * COMPARED)]
    found.append(example(Conversation([user("odd"), assistant("a")]), 99))
    encoding = encoder(odd if marks else unmarked(odd))
    assert len(list(encoding.rows(found))) == 4 * COMPARED
    assert list(encoding.notes()) == [FORCED_LINE.replace("2 answers", "1 answer")]


def test_white_space_that_joins_late_in_the_data_is_found():
    late = [example(Conversation([user("old"), assistant(" a")]), line) for line in range(1, 4 * COMPARED)]
    late.append(example(Conversation([user("old"), assistant("\nmaps")]), 99))
    encoding = encoder("default-system")
    *_, last = encoding.rows(late)
    assert encoding.tokenizer.decode(last.ids[slice(*last.spans[0])]) == "maps<|im_end|>"
    assert encoding.answers == {"joined": 1}


def test_the_ids_of_the_prompt_are_compared_too(monkeypatch):
    """The plain reference behind `Encoded.spans`: the prompt encoded by itself, for the first rows of a kind."""
    encoding, seen = encoder("chatml"), []
    asked = encoding.renderer.prompt_ids

    def other(messages, tools=None):
        seen.append(len(messages))
        return [*asked(messages, tools)[:-1], 9]

    monkeypatch.setattr(encoding.renderer, "prompt_ids", other)
    with pytest.raises(UserError) as caught:
        one(encoding, Conversation(TALK))
    assert caught.value.message.startswith(
        "talks.jsonl:7: the prompt is rendered in another way for training"
    )
    monkeypatch.setattr(encoding.renderer, "prompt_ids", lambda *given: seen.append(0) or asked(*given))
    seen.clear()
    list(encoder_rows(encoding, 3 * COMPARED))
    assert 0 < len(seen) <= 2 * COMPARED


def encoder_rows(encoding: Encoder, count: int) -> list[Row]:
    return list(encoding.rows(example(Conversation(TALK), line) for line in range(count)))


def test_the_first_error_of_the_data_is_told_and_what_comes_before_it_is_given():
    """Though the next batch is rendered before the one before it is checked."""
    good = Conversation([user("a"), assistant("b")])
    unchecked = Conversation([user("old"), assistant("")])  # has no answer, which checking finds
    unrendered = Conversation([assistant("a")])  # which rendering finds
    template = (
        TURN
        + "{% if m.content %}"
        + MARKS
        + "{% endif %}"
        + REST
        + "{% if messages[0].role == 'assistant' %}{{ raise_exception('x') }}{% endif %}"
    )
    for first, second, place in ((unchecked, unrendered, BATCH - 1), (good, unrendered, BATCH)):
        found = [example(good, line) for line in range(BATCH + 3)]
        found[BATCH - 1], found[BATCH] = example(first, BATCH - 1), example(second, BATCH)
        given: list[Row] = []
        with pytest.raises(UserError) as caught:
            for row in encoder(template).rows(found):
                given.append(row)
        assert caught.value.message.startswith(f"talks.jsonl:{place}: ")
        assert len(given) == place

    def reading():
        yield from [example(good, line) for line in range(BATCH)]
        raise UserError("the file ends in the middle", "x")

    rows = encoder("chatml").rows(reading())
    assert [next(rows).place for _ in range(BATCH)][-1] == f"talks.jsonl:{BATCH - 1}"
    with pytest.raises(UserError, match="the file ends in the middle"):
        next(rows)


def test_rows_may_be_left_unread():
    rows = encoder("chatml").rows(example(Conversation(TALK), line) for line in range(3 * BATCH))
    next(rows)
    rows.close()


def test_the_template_refuses_a_record():
    with pytest.raises(UserError) as caught:
        list(encoder("instruction").rows([example(Conversation([assistant("a")]), 3)]))
    assert caught.value.message == (
        "talks.jsonl:3: the chat template refuses it: roles must alternate: user, assistant, user, assistant"
        " (line 3 of the template)"
    )
    with pytest.raises(UserError) as caught:
        list(encoder("alpaca").rows([example(Conversation([user("a"), tool("b"), assistant("c")]), 3)]))
    assert caught.value.message == (
        "talks.jsonl:3: the chat template refuses it: the alpaca template has no turn for the role tool"
        " (line 1 of the template)"
    )


def test_a_completion_that_joins_its_prompt_is_refused():
    with pytest.raises(UserError) as caught:
        list(Encoder(byte_level()).rows([example(Completion("the old ", "maps"), 3, "prompt-completion")]))
    assert (
        caught.value.message
        == "talks.jsonl:3: the end of the prompt is other tokens once the answer follows it"
    )
    assert caught.value.hint == "let the answer begin with the white space that the prompt ends with"


@pytest.mark.parametrize("template", ["chatml", "alpaca", "model-turn"])
def test_a_sentencepiece_tokenizer_gives_the_same_text(template):
    encoding = encoder(template, metaspace())
    row = one(encoding, Conversation(TALK))
    said = [encoding.tokenizer.decode(row.ids[start : end - 1]) for start, end in row.spans]
    assert said == ["No.", "12 maps"]
