"""The dialect of chat templates: the text that transformers renders, and nothing that a sandbox should refuse."""

from __future__ import annotations

import pytest

from llmctl.tokenizer.jinja import BEGIN, END, FAULTS, ChatTemplate, first_line, parted, variables_of
from llmctl.tokenizer.template import TEMPLATES
from tests.tokenizer.talks import MARKED, NAMES, REWRITING, TAGS, byte_level
from tests.turns import assistant, call, system, tool, user

TOKENIZER = byte_level()
TALK = [
    system("Be."),
    user(" a\n"),
    assistant("b <x> & 'y'"),
    user("c"),
    assistant("", call("f", k=[1, "é"])),
    tool("d"),
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
DIALECT = {
    "white space": "{%- for m in messages -%}\n  {{- m.content -}}  \n{%- endfor -%}\n x \n",
    "blocks": "{% for m in messages %}\n  {% if m.content %}\n  {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[4] | tojson(indent=2) }}{{ messages[4] | tojson(ensure_ascii=True) }}"
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "dict": "{% set d = dict(a=1, **{'b': 2}) %}{{ d.a }}{{ d['b'] }}{{ dict.fromkeys(['k'], 3) }}",
    "macro": "{% macro say(m) %}[{{ m.role }}|{{ m.content | trim }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "slices": "{{ messages[1:][0].content.strip().upper() }}{{ messages[-1]['content'] }}{{ messages | length }}",
    "undefined": "{{ missing }}{{ messages[0].missing }}{% if missing is defined %}x{% endif %}{{ tools is none }}"
    "{{ documents is none }}{{ add_generation_prompt }}",
    "names": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "time": "{{ strftime_now('%Y-%m') }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{{ 'a' ~ 1 }}{{ '<b>' | e }}",
    "set in marks": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "captured": "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x }}",
    "range": "{% for n in range(3) %}{{ n }}{{ cycler('a', 'b').next() }}{% endfor %}",
}  # fmt: skip


def theirs(source: str, tools: list | None, prompt: bool) -> str:
    return TOKENIZER.apply_chat_template(
        TALK, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
    )


@pytest.mark.parametrize("name", DIALECT)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_dialect_is_that_of_transformers(name, prompt, tools):
    text = ChatTemplate(DIALECT[name], NAMES).render(TALK, tools, prompt)
    assert parted(text)[0] == theirs(DIALECT[name], tools, prompt)


@pytest.mark.parametrize("name", [*MARKED, "rewriting"])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_of_the_table_are_rendered_as_by_transformers(name, prompt):
    source = MARKED.get(name, REWRITING)
    talk = [one for one in TALK[1:4] if one["role"] != "system"]
    text = ChatTemplate(source, NAMES).render(talk, None, prompt)
    wanted = TOKENIZER.apply_chat_template(
        talk, chat_template=source, tokenize=False, add_generation_prompt=prompt
    )
    assert parted(text)[0] == wanted


@pytest.mark.parametrize("name", MARKED)
def test_marks_are_those_of_transformers(name):
    talk = [user("It's old"), assistant(" Yes,  12 maps.\n"), user("x"), assistant("东村")]
    text, spans = parted(ChatTemplate(MARKED[name], NAMES).render(talk, None))
    found = TOKENIZER.apply_chat_template(
        talk, chat_template=MARKED[name], return_dict=True, return_assistant_tokens_mask=True
    )
    encoding = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == found["input_ids"]
    mask = [int(any(a <= start < b for a, b in spans)) for start, _ in encoding["offset_mapping"]]
    assert mask == found["assistant_masks"]


def test_marks_are_taken_out_and_told():
    assert parted("plain") == ("plain", ())
    assert parted(f"a{BEGIN}bc{END}d{BEGIN}{END}{BEGIN}e{END}") == ("abcde", ((1, 3), (4, 4), (4, 5)))
    assert ChatTemplate("{%- generation -%}x{%- endgeneration -%}", {}).marked
    assert not ChatTemplate("{# generation #}x", {}).marked


def test_what_a_template_reads():
    assert variables_of("{% for m in messages %}{{ m }}{{ bos_token }}{% endfor %}") == {
        "messages",
        "bos_token",
    }
    assert all("messages" in variables_of(text) for text in TEMPLATES.values() if text)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__class__ }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace.__init__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{% for n in range(999999999) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_nothing_but_the_conversation(source):
    talk = [user("a")]
    with pytest.raises(FAULTS):
        text = ChatTemplate(source, {}).render(talk, None)
        if text == "":  # what is refused by being undefined
            raise ValueError
    assert talk == [user("a")]


def test_an_error_in_a_few_words():
    assert first_line(ValueError("Bad thing.\nmore")) == "bad thing"
    assert first_line(ValueError()) == "ValueError"


LINES = "{% for m in messages %}\n{% if m.role == 'tool' %}\n\n{{ FAULT }}\n{% endif %}\n{% endfor %}\n"


@pytest.mark.parametrize(
    ("fault", "said"), [("raise_exception('No tools.')", "no tools"), ("1 / 0", "division by zero")]
)
def test_an_error_names_the_line_of_the_template(fault, said):
    talk, source = [user("a"), {"role": "tool", "content": "b"}], LINES.replace("FAULT", fault)
    with pytest.raises(FAULTS) as ours:
        ChatTemplate(source, {}).render(talk, None)
    tokenizer = byte_level()
    tokenizer.chat_template = source
    with pytest.raises(FAULTS) as theirs:
        tokenizer.apply_chat_template(talk, tokenize=False)
    for caught in (ours, theirs):
        assert first_line(caught.value) == f"{said} (line 4 of the template)"


def test_an_error_of_syntax_names_its_line():
    with pytest.raises(FAULTS) as caught:
        ChatTemplate(LINES.replace("FAULT", "'unclosed"), {})
    assert first_line(caught.value).endswith(" (line 4 of the template)")


def test_the_tags_that_tests_take_out_are_all_there_are():
    assert all("generation %}" not in TAGS.sub("", text) for text in MARKED.values())
