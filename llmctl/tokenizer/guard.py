"""Control tokens that a message spells out stay text, while those that the template writes are tokens.

Before a template is rendered, placeholders take the place of control tokens (control.py) in the messages. In the
rendered text both change places: what a message spelled out is written as it was, and the template's own tokens
as placeholders. A copy of the tokenizer, which knows its control tokens by those placeholders only, encodes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from llmctl.tokenizer.jinja import NONCE

EDGE = "\ue0f7"
PLACEHOLDER = re.compile(f"{EDGE}{NONCE}(\\d+){EDGE}")


class Guard:
    """The control tokens of a tokenizer.

    Args:
        control: their texts.

    Attributes:
        spelled: matches one of them.
    """

    def __init__(self, backend: Tokenizer, control: Sequence[str]) -> None:
        self._special = sorted(control, key=len, reverse=True)
        self._number = {text: number for number, text in enumerate(self._special)}
        self._original = backend
        self.spelled = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._either = re.compile(f"{self.spelled.pattern}|{PLACEHOLDER.pattern}")

    def needed(self, messages: Sequence[dict[str, Any]], tools: Any) -> bool:
        """Whether a control token stands in some text of a conversation."""
        search = self.spelled.search
        for message in messages:
            for value in message.values():
                if search(value) if type(value) is str else any(map(search, _texts(value))):
                    return True
        return tools is not None and any(map(search, _texts(tools)))

    def hidden(self, value: Any) -> Any:
        """The value with placeholders for control tokens, in keys too."""
        if isinstance(value, str):
            return self.spelled.sub(lambda found: self._placeholder(found[0]), value)
        if isinstance(value, dict):
            return {self.hidden(key): self.hidden(inner) for key, inner in value.items()}
        return [self.hidden(inner) for inner in value] if isinstance(value, list | tuple) else value

    def swapped(self, text: str) -> str:
        """Placeholders for control tokens, and control tokens for placeholders."""
        return self._either.sub(self._other, text)

    def _other(self, found: re.Match[str]) -> str:
        return self._placeholder(found[0]) if found[1] is None else self._special[int(found[1])]

    def _placeholder(self, text: str) -> str:
        return f"{EDGE}{NONCE}{self._number[text]}{EDGE}"

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer with placeholders for the texts of its control tokens; the ids are the same."""
        rules = json.loads(self._original.to_str())
        rules["post_processor"] = rules["truncation"] = rules["padding"] = None
        for token in rules["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = rules["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(text): number for text, number in model["vocab"].items()}
        else:  # of a Unigram
            model["vocab"] = [[self._renamed(text), score] for text, score in model["vocab"]]
        if "merges" in model:  # those that would put such a token together out of text
            model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in self._number]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._renamed(model["unk_token"])
        return Tokenizer.from_str(json.dumps(rules))

    def _renamed(self, text: str) -> str:
        return self._placeholder(text) if text in self._number else text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(tuple(value))
        yield from _texts(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
