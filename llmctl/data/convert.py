"""One function a format: a record with the required keys -> its shape.

Each takes the record and a set that collects keys that the format has and this record no use for. `Bad` says
that a value is of a wrong type, `Unusable` that there is nothing in the record to train on.
"""

from __future__ import annotations

from typing import Any

from llmctl.data.readers import BLANK, NULL
from llmctl.data.records import kind
from llmctl.data.shapes import Completion, Conversation, Labelled, Preference, Text
from llmctl.data.turns import (
    Bad,
    Message,
    Unusable,
    content_of,
    messages,
    optional_text,
    says_nothing,
    text,
    tools,
    transcript,
)

ANSWER = "the answer"
NO_ANSWER = "no assistant turn in it"
EMPTY_PROMPT = "the prompt is empty"
EQUAL = "chosen and rejected are equal"
NOTHING_SHARED = "chosen and rejected have no prompt in common"

Keys = dict[str, Any]


def alpaca(record: Keys, unread: set[str]) -> Conversation:
    """One question, perhaps after others, and its answer."""
    answer = record["output"]
    if answer is None:
        raise Unusable(f"{ANSWER} is null")
    if not text(answer, "output").strip():
        raise Unusable(f"{ANSWER} is empty")
    return Conversation([*_asked(record), {"role": "assistant", "content": answer}])


def chat(record: Keys, unread: set[str]) -> Conversation:
    """`messages` with role and content."""
    turns = messages(record["messages"], "messages")
    return _conversation(turns, record)


def sharegpt(record: Keys, unread: set[str]) -> Conversation:
    """`conversations` with from and value."""
    return _conversation(_shared_turns(record), record)


def prompt_completion(record: Keys, unread: set[str]) -> Completion | Conversation:
    """Two strings are raw text; two lists of messages are one conversation."""
    prompt, completion = record["prompt"], record["completion"]
    if completion is None:
        raise Unusable(f"{ANSWER} is null")
    if type(prompt) is list and type(completion) is list:
        turns = messages(prompt, "prompt") + messages(completion, "completion")
        return _conversation(turns, record)
    if type(prompt) is list or type(completion) is list:
        raise Bad(
            f"`prompt` is {kind(prompt)}, but `completion` is {kind(completion)}",
            "two strings, or two lists of messages",
        )
    if not text(completion, "completion").strip():
        raise Unusable(f"{ANSWER} is empty")
    if record.get("tools"):
        unread.add("tools")
    return Completion(text(prompt, "prompt"), completion)


def plain(field: str, record: Keys, unread: set[str]) -> Text:
    """The text under one key."""
    if record[field] is None:
        raise Unusable(NULL)
    if not text(record[field], field).strip():
        raise Unusable(BLANK)
    return Text(record[field])


def preference(record: Keys, unread: set[str]) -> Preference:
    """A prompt of its own, and two answers; each is a string, a message, or a list of messages."""
    return _preference(_turns(record["prompt"], "prompt", "user"), record)


def sharegpt_preference(record: Keys, unread: set[str]) -> Preference:
    """A conversation that waits for an answer, and two answers."""
    return _preference(_shared_turns(record), record)


def alpaca_preference(record: Keys, unread: set[str]) -> Preference:
    """An instruction, and two answers."""
    return _preference(_asked(record), record)


def implicit_preference(record: Keys, unread: set[str]) -> Preference:
    """Two whole conversations. The prompt is what they share, up to the last user (or tool) turn."""
    chosen = _whole(record["chosen"], "chosen")
    rejected = _whole(record["rejected"], "rejected")
    if chosen == rejected:
        raise Unusable(EQUAL)
    shared = 0
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=False), start=1):
        if one != other:
            break
        if one["role"] in ("user", "tool"):
            shared = number
    if shared == 0:
        raise Unusable(NOTHING_SHARED)
    return _preference(chosen[:shared], {**record, "chosen": chosen, "rejected": rejected})


def labelled(record: Keys, unread: set[str]) -> Labelled:
    """`messages`, the last of which is wanted or not."""
    turns = messages(record["messages"], "messages")
    return _labelled(turns[:-1], turns[-1:], record)


def labelled_completion(record: Keys, unread: set[str]) -> Labelled:
    """A prompt and an answer that is wanted or not."""
    prompt = _turns(record["prompt"], "prompt", "user")
    return _labelled(prompt, _side(record["completion"], "completion", ANSWER), record)


# --- parts ------------------------------------------------------------------------------------------


def _conversation(turns: list[Message], record: Keys) -> Conversation:
    answered = False
    for turn in turns:
        if turn["role"] == "assistant":
            answered = True
            if says_nothing(turn):
                raise Unusable(f"{ANSWER} is empty")
    if not answered:
        raise Unusable(NO_ANSWER)
    return Conversation(turns, tools(record.get("tools")))


def _asked(record: Keys) -> list[Message]:
    """Alpaca: system, history, instruction and input, which a blank line keeps apart."""
    turns: list[Message] = []
    if system := optional_text(record.get("system"), "system"):
        turns.append({"role": "system", "content": system})
    for number, pair in enumerate(_history(record.get("history"))):
        if type(pair) is not list or len(pair) != 2:
            raise Bad(
                f"`history[{number}]` is no pair of strings", 'a turn is ["what was asked", "the answer"]'
            )
        for role, said, at in zip(("user", "assistant"), pair, (0, 1), strict=True):
            if not text(said, f"history[{number}][{at}]").strip():
                raise Unusable(f"an empty {role} turn in its history")
            turns.append({"role": role, "content": said})
    asked = optional_text(text(record["instruction"], "instruction"), "instruction")
    given = optional_text(record.get("input"), "input")
    if not asked and not given:
        raise Unusable(EMPTY_PROMPT)
    turns.append({"role": "user", "content": f"{asked}\n\n{given}" if asked and given else asked or given})
    return turns


def _history(value: Any) -> list[Any]:
    if value is None:
        return []
    if type(value) is not list:
        raise Bad(f"`history` is {kind(value)}, not a list of pairs")
    return value


def _shared_turns(record: Keys) -> list[Message]:
    """ShareGPT: the turns, the system prompt before them."""
    turns = messages(record["conversations"], "conversations")
    if system := optional_text(record.get("system"), "system"):
        first = {"role": "system", "content": system}
        if turns[:1] == [first]:
            return turns
        if any(turn["role"] == "system" for turn in turns):
            raise Bad("`system` is given as a key and as a turn", "delete one of them")
        return [first, *turns]
    return turns


def _turns(value: Any, field: str, role: str) -> list[Message]:
    """A string is one turn of `role`; a message and a list of messages are what they are."""
    if type(value) is str:
        return [{"role": role, "content": value}] if value.strip() else []
    if type(value) not in (dict, list):
        raise Bad(f"`{field}` is {kind(value)}, neither text nor messages")
    return messages([value] if type(value) is dict else value, field)


def _side(value: Any, field: str, called: str) -> list[Message]:
    """What the assistant says; `called` names it in the reasons."""
    if value is None:
        raise Unusable(f"{called} is null")
    turns = _turns(value, field, "assistant")
    if not turns:
        raise Unusable(f"{called} is empty")
    return turns


def _whole(value: Any, field: str) -> list[Message]:
    """A conversation as a list of messages or as a transcript."""
    if value is None:
        raise Unusable(f"{field} is null")
    if type(value) is str:
        return transcript(value, field) if value.strip() else []
    return messages(value, field)


def _preference(prompt: list[Message], record: Keys) -> Preference:
    chosen = _side(record["chosen"], "chosen", "chosen")
    rejected = _side(record["rejected"], "rejected", "rejected")
    _check_prompt(prompt)
    size = len(prompt)
    # some data gives the prompt on its own and once more at the head of both answers
    if chosen[:size] == prompt and rejected[:size] == prompt:
        chosen, rejected = chosen[size:], rejected[size:]
    _check_side(chosen, "chosen")
    _check_side(rejected, "rejected")
    if chosen == rejected:
        raise Unusable(EQUAL)
    return Preference(prompt, chosen, rejected, tools(record.get("tools")))


def _labelled(prompt: list[Message], completion: list[Message], record: Keys) -> Labelled:
    label = record["label"]
    if type(label) is not bool:
        raise Bad(f"`label` is {kind(label)}, not a boolean", "write true or false; csv holds only strings")
    _check_side(completion, ANSWER)
    _check_prompt(prompt)
    return Labelled(prompt, completion, label, tools(record.get("tools")))


def _check_prompt(prompt: list[Message]) -> None:
    if not any(content_of(turn).strip() for turn in prompt):
        raise Unusable(EMPTY_PROMPT)
    if prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with an assistant turn")


def _check_side(turns: list[Message], called: str) -> None:
    if not turns:
        raise Unusable(f"{called} is empty")
    if turns[0]["role"] != "assistant":
        raise Unusable(f"{called} does not begin with an assistant turn")
    if turns[-1]["role"] != "assistant":
        raise Unusable(f"{called} does not end with an assistant turn")
    if any(says_nothing(turn) for turn in turns if turn["role"] == "assistant"):
        raise Unusable(f"{called} is empty")
