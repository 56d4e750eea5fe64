"""Which special tokens are the template's alone: those that begin and end turns, and texts.

A message that spells one of them out would forge a turn or end a text, so there it stays text (guard.py). Other
special tokens are a part of what is said, and are tokens as transformers has it: `<think>`, the tags around
a call, and what else a model writes inside its answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from jinja2 import nodes
from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.jinja import ENVIRONMENT, FAULTS, MARK, Message
from llmctl.tokenizer.special import TURN_END, TURN_START

TAG = re.compile(r"([<\[])/?([^/<>\[\]]+)([>\]])")  # <name> and </name>, [name] and [/name]
# What begins and ends texts and turns in well-known formats. A tokenizer may have them without being used for that
# format: a template was exchanged, or the base is an older model's. Some are also HTML.
MARKERS = {
    "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>",
    TURN_START, TURN_END, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|return|>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|startoftext|>", "<|end_of_turn|>",
}  # fmt: skip
# roles of conversations that are rendered to see what stands around their words
PROBES: tuple[tuple[str, ...], ...] = (("user",), ("system", "user"), ("user", "assistant", "user"))
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Render = Callable[[Sequence[Message], bool], str]  # messages, whether the assistant is to begin -> text


def control_tokens(
    tokenizer: PreTrainedTokenizerFast, source: str, render: Render, stop_ids: Sequence[int]
) -> list[str]:
    """The special tokens that stay text in messages.

    They are the named ones (BOS, end, padding and their like), those that end a generation, those that the
    template writes around messages, and `MARKERS`. Not among them is what the template looks for in messages, as
    `'</think>' in content`, and a pair of tags that it writes in no turn but the assistant's.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {text for name, text in tokenizer.special_tokens_map.items() if name in NAMES}
    always = named | set(tokenizer.convert_ids_to_tokens(list(stop_ids))) | MARKERS
    asked = _written(special, render, generation=False)
    around = asked | _written(special, render, generation=True)
    sought = {token for text in sought_in(source) for token in special if token in text}
    pairs = _tag_pairs(special)
    said = sought | {token for token in around - asked if token in pairs}
    said |= {pairs[token] for token in said if token in pairs}
    return sorted(special & (always | (around - said)))


def sought_in(source: str) -> Iterator[str]:
    """Texts that a template looks for: `'…' in content`, `content.split('…')` and their like."""
    tree = ENVIRONMENT.parse(source)
    for compared in tree.find_all(nodes.Compare):
        if compared.ops and compared.ops[0].op in ("in", "notin"):
            yield from _constants([compared.expr])
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield from _constants(call.args)


def _constants(found: Sequence[nodes.Node]) -> Iterator[str]:
    for node in found:
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value


def _written(special: set[str], render: Render, *, generation: bool) -> set[str]:
    """The special tokens in the probes, without the turns of the assistant, which may hold anything."""
    found = ""
    for roles in PROBES:
        try:
            text = render([{"role": role, "content": MARK} for role in roles], generation)
        except FAULTS:
            continue  # not every template has each role
        if "assistant" not in roles or generation:
            found += text
        elif text.count(MARK) == len(roles):
            found += text.rpartition(MARK)[2]
    return {token for token in special if token in found}


def _tag_pairs(special: set[str]) -> dict[str, str]:
    """Token -> its other half, of tags of which both halves are special tokens."""
    pairs = {}
    for token in special:
        if tag := TAG.fullmatch(token):
            closes = token[1] == "/"
            other = f"{tag[1]}{'' if closes else '/'}{tag[2]}{tag[3]}"
            if other in special:
                pairs[token] = other
    return pairs
