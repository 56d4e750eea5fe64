"""Which part of a rendered conversation is trained: what the model itself would write at inference.

An answer is trained where the text before it is exactly the prompt that inference renders, and where it stands as
the template writes an answer that was just given. Templates of reasoning models rewrite earlier turns, so of some
conversations only the last answer is such a one. Of what is left out, `Marked.left` says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[int, int]

# reasons why an answer is not trained, or not trained as it stands; `Encoder` counts them
REWRITTEN = "history"  # the template writes it in another way once turns follow
UNPROMPTED = "unprompted"  # inference has no prompt for it, as for one that the conversation begins with
OTHER_PROMPT = "prompt"  # inference would render another prompt
OUTSIDE = "marks"  # it is outside the template's own marks
EMPTY = "empty"  # the template writes nothing of it
UNENDED = "unended"  # nothing after it stops generation; it is trained all the same
UNTHOUGHT = "thought"  # the template leaves out its reasoning; it is trained all the same
FORCED = "forced"  # its prompt is another one at inference; it is trained as the record has no other


class Answer(NamedTuple):
    """What is known of one answer.

    Args:
        turn: index of its message.
        asked: the prompt that inference renders for it; None if the template refuses to.
        through: the conversation up to and with it; None if the template refuses it. For the last message
            it is the whole text.
        before: the messages before it, without what makes the assistant begin; only looked at if `asked`
            is not how the whole text begins.
        is_written: whether the template writes anything of it.
    """

    turn: int
    asked: str | None
    through: str | None
    before: str = ""
    is_written: bool = True


class Marked(NamedTuple):
    """What is trained.

    Args:
        spans: [start, end) in characters, in order.
        turns: for each span the index of its message; an answer may have several spans.
        left: (reason, index of the message) of answers that are not trained, or not as they should be.
    """

    spans: tuple[Span, ...]
    turns: tuple[int, ...]
    left: tuple[tuple[str, int], ...] = ()


class Ends:
    """Where an answer ends.

    Args:
        special: texts of special tokens.
        stops: those that end a generation.
        openers: those that begin the next turn and so end an answer, of templates that write no other end.
    """

    def __init__(self, special: Sequence[str], stops: Sequence[str], openers: Sequence[str] = ()) -> None:
        self._tokens = tuple(sorted(special, key=len, reverse=True))
        either = _either(self._tokens)
        self._special = re.compile(either)
        self._stop = re.compile(f"(?:{_either(stops)})(?:{either})*")
        # where a user's turn ends an answer, that of a tool ends a call
        self._opener = re.compile(rf"\s*(?:{either})") if openers else None

    def end_of(self, through: str, begin: int) -> tuple[int, bool]:
        """Where the answer ends that begins at `begin` and is the last thing in `through`; whether it is ended.

        The end is the first token of its tail that stops generation, with the special tokens that follow without a
        gap: after `<|end|>` come a line break and the end of text in some templates, which no model would write.
        """
        start = max(begin, self.tail_of(through))
        if stop := self._stop.search(through, start):
            return stop.end(), True
        ends = [found.end() for found in self._special.finditer(through, start)]
        return (ends[-1] if ends else len(through)), False

    def opened(self, text: str, at: int) -> int | None:
        """The end of the token that opens the next turn at `at`, if it ends an answer."""
        found = self._opener.match(text, at) if self._opener else None
        return found.end() if found else None

    def seam(self, text: str, start: int, end: int) -> int:
        """The last place in text[start:end] where a special token or white space ends; `start` if there is none."""
        cuts = [start, *(start + one.end() for one in re.finditer(r"\s", text[start:end]))]
        cuts += [one.end() for one in self._special.finditer(text, start, end)]
        return max(cuts)

    def tail_of(self, text: str) -> int:
        """Where the special tokens and white space begin that end a text; from the right, as texts are long."""
        at = len(text)
        while at:
            before = len(text[:at].rstrip()) if text[at - 1].isspace() else at
            ends = next((token for token in self._tokens if text.endswith(token, 0, before)), "")
            if before == at and not ends:
                break
            at = before - len(ends)
        return at


def trained_spans(text: str, answers: Sequence[Answer], marks: Sequence[Span] | None, ends: Ends) -> Marked:
    """What is trained of a conversation.

    Args:
        text: all of it.
        answers: every message of the assistant, in order.
        marks: [start, end) of what the template says the assistant writes; None if it does not say.
    """
    found: list[tuple[int, Span]] = []
    left: list[tuple[str, int]] = []
    other: list[tuple[Answer, Span]] = []  # answers after another prompt than inference's
    for answer in answers:
        if not answer.is_written:
            left.append((EMPTY, answer.turn))
            continue
        begin, exact = _begin(text, answer, ends)
        if begin is None:
            left.append((UNPROMPTED if answer.asked is None else OTHER_PROMPT, answer.turn))
            continue
        span, why = _span(text, answer, begin, ends)
        if span is None:
            left.append((why, answer.turn))
        elif not exact:
            other.append((answer, span))
        else:
            found.append((answer.turn, span))
            left += [(why, answer.turn)] if why else []
    if not found:  # of some templates no answer ever follows the prompt that they render at inference
        found = [(answer.turn, span) for answer, span in other]
    forced = {turn for turn, _ in found}
    left += [(FORCED if answer.turn in forced else OTHER_PROMPT, answer.turn) for answer, _ in other]
    if marks is not None:
        pieces = [(turn, _inside(span, marks)) for turn, span in found]
        left += [(OUTSIDE, turn) for turn, inside in pieces if not inside]
        found = [(turn, piece) for turn, inside in pieces for piece in inside]
    return Marked(tuple(span for _, span in found), tuple(turn for turn, _ in found), tuple(left))


def _begin(text: str, answer: Answer, ends: Ends) -> tuple[int | None, bool]:
    """Where an answer begins, and whether that is where inference would begin to write.

    If the text goes another way than the prompt of inference, the answer begins after the last token or word that
    both have of its turn. None if its turn cannot be found, or inference has no prompt for it.
    """
    asked, before = answer.asked, answer.before
    if asked is None:
        return None, False
    if text.startswith(asked):
        return len(asked), True
    start = common_prefix(text, before)
    if start < ends.tail_of(before):
        return None, False
    shared = common_prefix(text, asked)
    return ends.seam(text, min(start, shared), shared), False


def _span(text: str, answer: Answer, begin: int, ends: Ends) -> tuple[Span | None, str]:
    """The answer from `begin` on, and what is to be said of it; None if it does not stand there as it was given."""
    through = answer.through
    if through is None:
        return None, REWRITTEN
    end, ended = ends.end_of(through, begin)
    if text[:end] != through[:end]:
        return None, REWRITTEN
    if not ended and text.startswith(through) and (opened := ends.opened(text, len(through))):
        end, ended = opened, True
    if begin >= end:
        return None, EMPTY
    return (begin, end), "" if ended else UNENDED


def _inside(span: Span, marks: Sequence[Span]) -> list[Span]:
    """The parts of a span that lie inside marks; of marks that touch, one part."""
    parts: list[Span] = []
    for start, end in marks:
        start, end = max(span[0], start), min(span[1], end)
        if parts and parts[-1][1] == start < end:
            parts[-1] = parts[-1][0], end
        elif start < end:
            parts.append((start, end))
    return parts


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # they share the first `low`, and no more than `high`
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low


def _either(texts: Sequence[str]) -> str:
    """A pattern for any of some texts."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"
