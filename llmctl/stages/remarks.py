"""What is said, once, of the answers and messages of a data set that cannot be trained as they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from llmctl.tokenizer.answers import (
    EMPTY,
    FORCED,
    OTHER_PROMPT,
    OUTSIDE,
    REWRITTEN,
    UNENDED,
    UNPROMPTED,
    UNTHOUGHT,
)

JOINED, SPLIT = "joined", "split"

# reason -> what is said of so many answers
OF_ANSWERS: dict[str, str] = {
    REWRITTEN: "not trained: the chat template writes an earlier answer in another way once turns follow it "
    "(`data.rewritten=split` makes a row of each)",
    SPLIT: "trained in a row of its own each: the chat template writes an earlier answer in another way once "
    "turns follow it",
    UNPROMPTED: "not trained: inference renders no prompt for it, as for one that a conversation begins with",
    OTHER_PROMPT: "not trained: inference renders another prompt for it",
    FORCED: "trained after a prompt that inference does not render: with this chat template no answer of the record "
    "has another one",
    OUTSIDE: "not trained: it is outside the `generation` marks of the chat template",
    EMPTY: "not trained: the chat template writes nothing of it",
    UNTHOUGHT: "trained without its reasoning: the chat template leaves it out",
    UNENDED: "trained without an end: the chat template writes none that stops generation",
    JOINED: "trained from its second token on: the first belongs to the end of the prompt too",
}
# reasons why nothing of a conversation is trained that lie in the conversation, and not in a faulty template
UNTRAINABLE: dict[str, str] = {
    UNPROMPTED: "no answer to train: the conversation begins with the only one",
    REWRITTEN: "no answer to train: the chat template writes each in another way once turns follow it",
    OTHER_PROMPT: "no answer to train: inference renders another prompt for each",
    JOINED: "no answer to train: its tokens are those of the prompt too",
}


def remarks(answers: Counter[str], unwritten: Counter[str]) -> Iterator[str]:
    """Sentences.

    Args:
        answers: reason, of `OF_ANSWERS` -> answers.
        unwritten: what the template leaves out -> records that have it.
    """
    for what, count in sorted(unwritten.items()):
        yield f"{_count(count, 'record')}: {what} left out, which the chat template does not write"
    for reason, said in OF_ANSWERS.items():
        if count := answers[reason]:
            yield f"{_count(count, 'answer')} {said}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
