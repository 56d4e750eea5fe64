"""The chat template: the one text that training, chat and serving render."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import dropwhile, takewhile

from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.tokenizer.forms import Forms
from llmctl.tokenizer.jinja import FAULTS, MARK, ChatTemplate, first_line, parted
from llmctl.tokenizer.kinds import TURN_END, TURN_START

# Content is trimmed because white space at its edge would fuse with the line break before it, and the
# ids of a rendered prompt would no longer begin the ids of the rendered conversation. The `generation`
# marks enclose what the assistant writes: content, calls and the end of its turn.
CHATML = (
    "{{- bos_token -}}"
    "{%- set turns = messages -%}"
    "{%- if tools -%}"
    "{{- '" + TURN_START + "system\\n' -}}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{{- messages[0]['content'] | trim + '\\n\\n' -}}"
    "{%- set turns = messages[1:] -%}"
    "{%- endif -%}"
    "{{- 'You can call these functions, one JSON object a line:' -}}"
    "{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}"
    "{{- '\\nTo call one, write a JSON object with its name and arguments between <tool_call> and </tool_call>.' -}}"
    "{{- '" + TURN_END + "\\n' -}}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['content'] is not string -%}"
    "{{- raise_exception('the content of a message must be text') -}}"
    "{%- endif -%}"
    "{{- '" + TURN_START + "' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}"
    "{{- message['content'] | trim -}}"
    "{%- if 'tool_calls' in message -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '\\n' if message['content'] | trim or not loop.first else '' -}}"
    "{{- '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '" + TURN_END + "' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] | trim + '" + TURN_END + "' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '" + TURN_START + "assistant\\n' -}}"
    "{%- endif -%}"
)

# Headings of plain text, so a base model needs no new tokens (the form of Taori et al. 2023).
ALPACA = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is not string -%}"
    "{{- raise_exception('the content of a message must be text') -}}"
    "{%- endif -%}"
    "{{- '' if loop.first else '\\n\\n' -}}"
    "{%- if message['role'] == 'system' -%}"
    "{{- message['content'] | trim -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '### Instruction:\\n' + message['content'] | trim -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '### Response:\\n' -}}"
    "{%- generation -%}"
    "{{- message['content'] | trim + eos_token -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{{- raise_exception('the alpaca template has no turn for the role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '\\n\\n### Response:\\n' -}}"
    "{%- endif -%}"
)

# What the recipe fields `chat_template` and `data.template` may say by name.
TEMPLATES: dict[str, str | None] = {"chatml": CHATML, "alpaca": ALPACA, "none": None}


def template_hash(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """SHA-256 of the chat template, hexadecimal; None without one."""
    template = tokenizer.chat_template
    if template is None:
        return None
    if isinstance(template, dict) and list(template) == ["default"]:
        (template,) = template.values()  # as it is saved again
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes after an answer.

    Args:
        ids: the first special token after it, and those that follow without a gap; empty if there is none.
        opener: the token that begins the next turn, of a template that writes no other end.
    """

    ids: tuple[int, ...] = ()
    opener: int | None = None


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that end a generation: end of text, and what the template writes after an answer.

    The end of a turn is found by rendering one, so it holds for any template: it is the first
    special token after the assistant's words, or else the one that begins the next turn.

    Raises UserError if the template cannot render a question and its answer.
    """
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        return found
    end = turn_end(tokenizer)
    return list(dict.fromkeys([*found, *end.ids, *([] if end.opener is None else [end.opener])]))


def turn_end(tokenizer: PreTrainedTokenizerFast) -> TurnEnd:
    """How an answer ends. Raises UserError if the template cannot render a question and its answer."""
    try:
        template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
        rest = _after_answer(template, "user", "assistant")
    except FAULTS as error:
        raise UserError(
            f"the chat template cannot write a question and its answer: {first_line(error)}",
            "choose another one with --template",
        ) from None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if rest is None:  # it leaves the answer out
        return TurnEnd()
    if run := _first_special(tokenizer, rest, special):
        return TurnEnd(run)
    if template.marked:
        return TurnEnd()
    try:
        rest = _after_answer(template, "user", "assistant", "user")
    except FAULTS:
        return TurnEnd()
    run = _first_special(tokenizer, (rest or "").partition(MARK)[0], special)
    return TurnEnd(opener=run[0] if run else None)


def _after_answer(template: ChatTemplate, *roles: str) -> str | None:
    """What follows the words of the first answer; None if they are left out. Raises one of `FAULTS`."""
    forms = Forms(lambda messages: template.render(messages, None))
    turns = [{"role": role, "content": MARK} for role in roles]
    try:
        text = parted(template.render(forms.prepared(turns), None))[0]
    except FAULTS:
        system = [{"role": "system", "content": MARK}, *turns]  # some templates insist on one
        try:
            text = parted(template.render(forms.prepared(system), None))[0].partition(MARK)[2]
        except FAULTS:
            text = parted(template.render(turns, None))[0]  # raises what it raised at first
    parts = text.split(MARK, 2)
    return parts[2] if len(parts) > 2 else None


def _first_special(tokenizer: PreTrainedTokenizerFast, text: str, special: set[int]) -> tuple[int, ...]:
    """The first special token of a text and those that follow it without a gap."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    run = dropwhile(lambda token: token not in special, ids)
    return tuple(takewhile(lambda token: token in special, run))
