"""Chat templates in the structure of those that reason, call tools in their own way, or write no plain text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.tokenizer.talks import byte_level

GENERATION = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
# thinks in the answer to the last question only, as Qwen 3 does
THINKING = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set content = m.content or '' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
) + GENERATION
# the prompt ends inside the reasoning, which the history does not have, as in DeepSeek R1
PREFILLED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}<|im_start|>{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
# fails on an empty conversation, which is what stands before an answer that comes first
DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
) + GENERATION
# the end of text stands once, after the whole, as in Phi 3
ENDED_ONCE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# nothing ends an answer but the next turn, as in GLM 4
NEXT_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '[/INST]' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]{% endif %}"
)
# content is a list of parts, as in models that also see images
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.tool_calls %}CONTENT{%- for c in m.tool_calls %}{{- '[' + c.function.name + ' ' }}ARGUMENTS{{- ']' }}"
    "{%- endfor %}{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
) + GENERATION


def calling(arguments: str, content: str = "") -> str:
    """A template that writes calls, with what writes arguments, of `c`, and content, of `m`."""
    return CALLS.replace("ARGUMENTS", arguments).replace("CONTENT", content)


JOINS_TEXT = calling("{{- '' + c.function.arguments }}")  # as DeepSeek V3
READS_OBJECT = calling("{{- c.function.arguments | tojson }}")  # as Qwen 2.5
READS_ITEMS = calling(
    "{%- for k, v in c.function.arguments.items() %}{{- k + '=' + v }}{%- endfor %}"
)  # as GLM 4
READS_BOTH = calling(
    "{%- if c.function.arguments is string %}{{- c.function.arguments }}"
    "{%- else %}{{- c.function.arguments | tojson }}{%- endif %}"
)  # as Qwen 3
JOINS_CONTENT = calling("{{- '' + c.function.arguments }}", "{{- m.content + ': ' }}")
NEEDS_NULL = calling(
    "{{- c.function.arguments | tojson }}",
    "{%- if m.content is none %}{{- '-' }}{%- else %}{{- m.nothing.more }}{%- endif %}",
)


def thinking(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer for which `<think>` and `</think>` are special tokens."""
    made = byte_level()
    made.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    made.chat_template = template
    return made
