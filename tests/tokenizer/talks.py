"""Chat templates in the structure of well-known ones, and tokenizers to render them with.

Each template has generation marks; `unmarked` takes them out, and nothing else about it changes.
"""

from __future__ import annotations

import json
import re

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llmctl.tokenizer.learners import SPLIT
from llmctl.tokenizer.template import ALPACA, CHATML

# headers of two tokens and an empty line; a default system prompt; tools as JSON; calls as JSON
HEADERS = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nYou answer.<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if tools and loop.first %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# a default system prompt; content as it is
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}<|im_end|>\n"
    "{% else %}<|im_start|>system\nYou are a helper; write markdown.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# no header for the answer; the system turn is part of the first question; roles must alternate
INSTRUCTION = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, assistant.') }}{% endif %}"
    "{% if m.role == 'user' %}[INST]{{ ' ' + (system if loop.first else '') + m.content | trim }}[/INST]"
    "{% else %}{% generation %}{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
# another name for the assistant; no system turn
MODEL_TURN = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# earlier answers lose what they thought, as soon as there is a later question
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = {
    "chatml": CHATML,
    "alpaca": ALPACA,
    "headers": HEADERS,
    "default-system": DEFAULT_SYSTEM,
    "instruction": INSTRUCTION,
    "model-turn": MODEL_TURN,
}
TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
SPECIAL = [
    "<|pad|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"}
TEXTS = [
    "It's the miller's 12 old maps, isn't it? \n\n\tOh: 东村有八户人家。 <|x|> |im_ end_ >\r\n"
] * 3  # to learn from


def unmarked(template: str) -> str:
    """The template without its generation marks."""
    return TAGS.sub("", template)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, cut as Llama 3 and Qwen cut it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **_learning())
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _named(tokenizer)


def trimming() -> PreTrainedTokenizerFast:
    """The same, but the places of tokens leave out spaces, as Llama 3's do."""
    made = byte_level()
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def metaspace() -> PreTrainedTokenizerFast:
    """Spaces are U+2581 and one is put before the text, rare characters are bytes, as in Mistral's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=460, **_learning(bytes_)))
    rules = json.loads(tokenizer.to_str())
    # entries of the vocabulary, but no tokens that a text could spell out
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] in SPECIAL]
    return _named(Tokenizer.from_str(json.dumps(rules)))


def prefixed() -> PreTrainedTokenizerFast:
    """A normalizer writes a space before every part between special tokens, as in Llama 2's."""
    made = metaspace()
    backend = made.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return made


def swallowing() -> PreTrainedTokenizerFast:
    """Special tokens take the white space after them, as in Phi 3's."""
    made = byte_level()
    tokens = [AddedToken(text, rstrip=True, special=True) for text in SPECIAL if text not in NAMES.values()]
    made.backend_tokenizer.add_special_tokens(tokens)
    return made


def _learning(more: list[str] | None = None) -> dict[str, object]:
    return {"special_tokens": [*SPECIAL, *(more or [])], "show_progress": False}


def _named(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


TOKENIZERS = {
    "byte-level": byte_level,
    "trimming": trimming,
    "metaspace": metaspace,
    "prefixed": prefixed,
    "swallowing": swallowing,
}
