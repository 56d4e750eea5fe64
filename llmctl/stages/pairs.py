"""Preferences as pairs of finished rows, with an account of every record read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import split_holdout
from llmctl.data.document import Account
from llmctl.data.formats import Example, examples
from llmctl.data.packing import Pieces
from llmctl.data.shapes import Conversation, Preference
from llmctl.errors import UserError
from llmctl.recipe.tune import PairData
from llmctl.stages.encode import BATCH, Encoder
from llmctl.stages.remarks import UNTRAINABLE
from llmctl.stages.rows import OVERLONG, counted, refuse_many_dropped
from llmctl.talk import Talk
from llmctl.tokenizer.answers import OTHER_PROMPT, REWRITTEN
from llmctl.tokenizer.render import Encoded, Rendered

NO_ROOM = "the prompt alone takes all {:,} tokens"
SAME = "chosen and rejected are the same within {:,} tokens"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two ways to go on after a prompt, as ids; both answers hold their end token unless they were cut.

    Args:
        cut: tokens taken off both answers together.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    place: str
    cut: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longer of both rows."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PairRows:
    """Pairs of one data set; `fingerprint` hashes all their ids."""

    pairs: list[Pair]
    account: Account
    formats: dict[str, int]
    max_length: int

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for pair in self.pairs:
            for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
                digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        return digest.hexdigest()[:32]

    def manifest(self, sources: list[str]) -> dict[str, Any]:
        """What a manifest records of the data."""
        return {
            "sources": sources,
            "fingerprint": self.fingerprint,
            "formats": self.formats,
            "rows": len(self.pairs),
            "truncated": sum(pair.cut > 0 for pair in self.pairs),
            "account": self.account.to_json(),
        }

    def shorter_wins(self) -> float:
        """How often the chosen answer is the shorter one, ties counting half: what a rule about length alone gets."""
        pairs = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in self.pairs]
        return sum(0.5 if a == b else float(a < b) for a, b in pairs) / max(1, len(pairs))


def pair_rows(
    data: PairData, tokenizer: PreTrainedTokenizerFast, max_length: int, seed: int, talk: Talk
) -> tuple[PairRows, PairRows | None]:
    """Pairs to train on, and pairs to evaluate on: from `data.eval`, or held out of the training ones.

    Pairs of one prompt stay together, so that no prompt is trained on and evaluated on.

    Raises UserError: as `read_pairs`.
    """
    made = read_pairs(data.train, data, tokenizer, max_length, talk)
    if data.eval:
        return made, read_pairs(data.eval, data, tokenizer, max_length, talk)
    known: dict[tuple[int, ...], int] = {}
    prompt = [known.setdefault(tuple(pair.prompt_ids), len(known)) for pair in made.pairs]
    if len(known) < 2 and data.eval_fraction:
        raise UserError(
            "all pairs have the same prompt, so none can be held out for evaluation",
            "give more data, name evaluation data in data.eval, or set data.eval_fraction=0",
        )
    numbers = np.arange(len(known))
    parts = split_holdout(Pieces(numbers, np.full_like(numbers, 2), numbers), data.eval_fraction, seed)
    kept, held = (set(part.start.tolist()) for part in parts)

    def those(chosen: set[int]) -> PairRows:
        return replace(
            made, pairs=[pair for pair, which in zip(made.pairs, prompt, strict=True) if which in chosen]
        )

    return those(kept), those(held) if held else None


def read_pairs(
    sources: list[str], data: PairData, tokenizer: PreTrainedTokenizerFast, max_length: int, talk: Talk
) -> PairRows:
    """All records of some sources as pairs. Says what was read, kept, dropped and cut.

    Raises UserError: as `examples`; a record without preferences; what `Encoder.check` finds; no pair is
    left; more than a tenth would be dropped for their length without `data.overlong` saying so.
    """
    account = Account(noun="record")
    encoder = Encoder(tokenizer)
    found = encoded_pairs(encoder, counted(examples(sources, "text", account, columns=data.columns), talk))
    return fitted_pairs(found, encoder, account, data, max_length, talk)


def fitted_pairs(
    found: Iterable[Pair], encoder: Encoder, account: Account, data: PairData, max_length: int, talk: Talk
) -> PairRows:
    """Pairs of at most `max_length` tokens; see `read_pairs`.

    Args:
        found: is read to the end here; `encoder` and `account` have then counted what it held.
    """
    if data.overlong == "split":
        raise UserError("data.overlong: `split` makes no sense for a pair of answers", "use drop or truncate")
    found = list(found)
    long = [pair.place for pair in found if pair.longest > max_length]
    if data.overlong is None:
        refuse_many_dropped(long, len(found), max_length)
    if data.overlong == "error" and long:
        raise UserError(
            f"{len(long):,} of {len(found):,} records are longer than {max_length:,} tokens, as {long[0]}",
            "set data.overlong to drop or truncate, or raise data.max_length (up to the context of the model)",
        )
    pairs = [
        kept for pair in found if (kept := _fitted(pair, data.overlong, max_length, account)) is not None
    ]
    for sentence in encoder.notes():
        account.note(sentence)
    said = ", ".join(f"{count:,} {name}" for name, count in sorted(encoder.formats.items()))
    lines = [f"formats: {said}", *account.lines()]
    if cut := [pair for pair in pairs if pair.cut]:
        lost = sum(pair.cut for pair in cut)
        lines.append(
            f"truncated {len(cut):,} record(s) longer than {max_length:,} tokens, {lost:,} tokens lost"
        )
    for line in lines:
        talk.say(line)
    if not pairs:
        raise UserError(
            f"no pair is left to train on ({'; '.join(account.lines())})",
            "raise data.max_length (up to the context of the model), or give other data",
        )
    return PairRows(pairs, account, dict(encoder.formats), max_length)


def encoded_pairs(encoder: Encoder, found: Iterable[Example]) -> Iterator[Pair]:
    """Preferences as pairs, whatever their length, in order. Raises UserError with the place."""
    found = iter(found)
    while batch := list(islice(found, BATCH)):
        rendered = []
        for example in batch:
            shape = _preference(example)
            encoder.formats[example.format] += 1
            for talk in _talks(shape):
                one = encoder.render(talk.messages, talk.tools, example)
                rendered.append(_without_prompt(one, len(shape.prompt)))
        ids = encoder.renderer.encode(rendered)
        for number, example in enumerate(batch):
            shape, at = _preference(example), 2 * number
            sides = [
                _cut_at_answer(encoder, one, text, talk, example.place, len(shape.prompt))
                for one, text, talk in zip(
                    ids[at : at + 2], rendered[at : at + 2], _talks(shape), strict=True
                )
            ]
            (prompt, chosen), (other, rejected) = sides
            if prompt != other:
                raise UserError(
                    f"{example.place}: the chat template renders the prompt in two ways, by the answer that follows",
                    "choose another template with --template, as --template chatml",
                )
            yield Pair(prompt, chosen, rejected, example.place)


def _preference(example: Example) -> Preference:
    if not isinstance(example.shape, Preference):
        raise UserError(
            f"{example.place}: no pair of answers: the record is `{example.format}`",
            "a pair has `chosen` and `rejected`; name them if they are called otherwise: --columns prompt=A,chosen=B,rejected=C",
        )
    return example.shape


def _talks(shape: Preference) -> list[Conversation]:
    """The conversations that end with each of both answers."""
    return [Conversation([*shape.prompt, *answer], shape.tools) for answer in (shape.chosen, shape.rejected)]


def _without_prompt(one: Rendered, prompt: int) -> Rendered:
    """A conversation in which nothing of the first `prompt` messages is trained."""
    own = [(span, turn) for span, turn in zip(one.spans, one.turns, strict=True) if turn >= prompt]
    left = tuple((why, turn) for why, turn in one.left if turn >= prompt)
    return one._replace(spans=tuple(span for span, _ in own), turns=tuple(turn for _, turn in own), left=left)


def _cut_at_answer(
    encoder: Encoder, one: Encoded, rendered: Rendered, talk: Conversation, place: str, prompt: int
) -> tuple[list[int], list[int]]:
    """Prompt and answer: the answer begins with the message after `prompt` others and ends with the last one.

    Raises UserError as `Encoder.check`, and if nothing of that message can be trained.
    """
    why = encoder.check(one, rendered, talk, place)
    starts = [span[0] for span, turn in zip(one.spans, rendered.turns, strict=True) if turn == prompt]
    if why or not starts:
        if OTHER_PROMPT in dict(rendered.left):
            encoder.compare_prompt(one.ids, 0, talk.messages[:prompt], talk.tools, place)
        raise UserError(f"{place}: {why or UNTRAINABLE[REWRITTEN]}", "mend or delete this record")
    return one.ids[: starts[0]], one.ids[starts[0] : one.spans[-1][1]]


def _fitted(pair: Pair, overlong: str | None, max_length: int, account: Account) -> Pair | None:
    if pair.longest > max_length:
        if overlong != "truncate":
            account.reject(OVERLONG.format(max_length), pair.place)
            return None
        room = max_length - len(pair.prompt_ids)
        if room < 1:
            account.reject(NO_ROOM.format(max_length), pair.place)
            return None
        chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
        lost = len(pair.chosen_ids) - len(chosen) + len(pair.rejected_ids) - len(rejected)
        pair = replace(pair, chosen_ids=chosen, rejected_ids=rejected, cut=lost)
    if pair.chosen_ids == pair.rejected_ids:  # cut so, or apart only in white space that the template trims
        account.reject(SAME.format(max_length), pair.place)
        return None
    return pair
