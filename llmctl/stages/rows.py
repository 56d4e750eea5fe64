"""Conversations and texts as the rows a loop trains on, with an account of every record read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import Laid, labels_of, split_holdout
from llmctl.data.document import Account
from llmctl.data.formats import Example, examples
from llmctl.data.packing import Pieces, cut, pack, unpacked
from llmctl.data.shapes import Conversation, Preference
from llmctl.errors import UserError, one_of
from llmctl.recipe.tune import SftData
from llmctl.stages.encode import Encoder, Row
from llmctl.talk import Talk

SHARE = 0.1  # of the records that may be dropped for their length without being asked to
SHORT = "fewer than two tokens: nothing to predict"
UNTRAINED = "nothing of an answer is within {:,} tokens"
OVERLONG = "longer than {:,} tokens"


@dataclass(frozen=True)
class TalkRows:
    """Rows of one data set.

    Args:
        places: where each document was read, by its number.
        formats: format -> records of it.
        answers, unwritten: as in `Encoder`.
    """

    laid: Laid
    doc_start: np.ndarray
    places: Sequence[str]
    account: Account
    formats: dict[str, int]
    max_length: int
    answers: dict[str, int] = field(default_factory=dict)
    unwritten: dict[str, int] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the ids of all pieces and of which are trained, so of everything training sees."""
        pieces, trained = self.laid.pieces, self.laid.trained
        assert trained is not None
        digest = hashlib.sha256()
        for part in (self.laid.ids, trained, pieces.start, pieces.length):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:32]

    def manifest(self, sources: list[str]) -> dict[str, Any]:
        """What a manifest records of the data."""
        return {
            "sources": sources,
            "fingerprint": self.fingerprint,
            "formats": self.formats,
            "rows": len(self.laid.rows),
            "tokens": int(self.laid.pieces.length.sum()),
            "trained_tokens": self.laid.trained_tokens,
            "cut": self.laid.pieces.counts,
            "account": self.account.to_json(),
        }

    def prompts(self, count: int | None = None) -> list[tuple[list[int], list[int]]]:
        """Prompt and first answer, as ids, of the first `count` pieces (all if None) that begin with a prompt."""
        found: list[tuple[list[int], list[int]]] = []
        trained = self.laid.trained
        assert trained is not None
        begins = set(self.doc_start.tolist())
        for start, length in zip(
            self.laid.pieces.start.tolist(), self.laid.pieces.length.tolist(), strict=True
        ):
            if len(found) == count:
                break
            labels = trained[start : start + length]
            first = int(labels.argmax())
            if first < 1 or start not in begins:
                continue
            rest = np.flatnonzero(~labels[first:])
            end = first + int(rest[0]) if len(rest) else length
            ids = self.laid.ids[start : start + length].tolist()
            found.append((ids[:first], ids[first:end]))
        return found


def talk_rows(
    data: SftData,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    seed: int,
    talk: Talk,
    *,
    measured: bool = False,
) -> tuple[TalkRows, TalkRows | None]:
    """Training rows, and evaluation rows from `data.eval` or held out of the training records.

    Says what was read, kept, dropped and cut. `measured` is for data that no model is trained on; see `read_rows`.

    Raises UserError: as `examples` and `Encoder.rows`; no row is left; more than a tenth would be
    dropped for their length without `data.overlong` saying so.
    """
    made = read_rows(data.train, data, tokenizer, max_length, talk, measured=measured)
    if data.eval:
        return made, read_rows(data.eval, data, tokenizer, max_length, talk, measured=measured)
    kept, held = _held_out(made.laid.pieces, made.places, data.eval_fraction, seed)
    kept = replace(kept, counts=made.laid.pieces.counts)
    lay = _layer(made, data.packing)
    return lay(kept), lay(held) if len(held) else None


def _held_out(pieces: Pieces, places: Sequence[str], fraction: float, seed: int) -> tuple[Pieces, Pieces]:
    """As `split_holdout`, with all rows of a record on one side: of those split off, each holds the ones before it."""
    known: dict[str, int] = {}
    record = np.array([known.setdefault(place, len(known)) for place in places])[pieces.doc]
    if len(known) == len(places):
        return split_holdout(pieces, fraction, seed)
    numbers = np.unique(record)
    _, held = split_holdout(Pieces(numbers, np.full_like(numbers, 2), numbers), fraction, seed)
    chosen = np.isin(record, held.doc)
    return pieces.take(~chosen), pieces.take(chosen)


def read_rows(
    sources: list[str],
    data: SftData,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    talk: Talk,
    *,
    measured: bool = False,
) -> TalkRows:
    """All records of some sources as rows; see `talk_rows`.

    Args:
        measured: the data is only measured on: of preferences the chosen answers, and whole texts, split
            into rows, whatever `data.overlong` says of conversations.
    """
    account = Account(noun="record")
    read = examples(sources, data.text_field, account, columns=data.columns)
    encoder = Encoder(tokenizer, data.mask_prompt, data.rewritten == "split")
    rows = list(encoder.rows(counted(map(_wanted, read) if measured else read, talk)))
    # texts first: they are cut by another rule than conversations, and the order of rows is shuffled anyway
    rows.sort(key=lambda row: not row.is_text)
    ids, trained, doc_start = flat(rows)
    places = [row.place for row in rows]
    texts = sum(row.is_text for row in rows)
    policies = ("split" if measured else data.overlong, data.overlong)
    found = _cut(doc_start, texts, policies, max_length, places)
    pieces = _useful(found, trained)
    lengths = np.diff(doc_start)
    kept = {places[doc] for doc in pieces.doc.tolist()}
    for doc in np.setdiff1d(np.arange(len(places)), pieces.doc).tolist():
        reason = SHORT if lengths[doc] < 2 else UNTRAINED if doc in found.doc else OVERLONG
        if places[doc] not in kept:  # of a record that was split into rows all are left out
            account.reject(rows[doc].why or reason.format(max_length), places[doc])
            kept.add(places[doc])
    for sentence in encoder.notes():
        account.note(sentence)
    if not len(pieces):
        raise UserError(
            f"no record is left to train on ({'; '.join(account.lines())})",
            "raise data.max_length (up to the context of the model), or give other data",
        )
    said = ", ".join(f"{count:,} {name}" for name, count in sorted(encoder.formats.items()))
    for line in [f"formats: {said}", *account.lines(), *pieces.lines(max_length)]:
        talk.say(line)
    laid = Laid(ids, pieces, _rows(pieces, max_length, data.packing), trained)
    told = dict(encoder.answers), dict(encoder.unwritten)
    return TalkRows(laid, doc_start, places, account, dict(encoder.formats), max_length, *told)


def _wanted(example: Example) -> Example:
    """A preference as the conversation it prefers; anything else as it is."""
    shape = example.shape
    if not isinstance(shape, Preference):
        return example
    return replace(example, shape=Conversation([*shape.prompt, *shape.chosen], shape.tools))


def flat(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids uint32 [N], trained bool [N] and doc_start int64 [D+1] of rows laid end to end."""
    doc_start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.ids) for row in rows], out=doc_start[1:])
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.uint32, count=int(doc_start[-1]))
    trained = np.zeros(len(ids), dtype=bool)
    for row, at in zip(rows, doc_start.tolist(), strict=False):
        for start, end in row.spans:
            trained[at + start : at + end] = True
    return ids, trained, doc_start


def refuse_many_dropped(dropped: list[str], of: int, max_length: int) -> None:
    """Raise UserError if the default policy would leave out more than a tenth of the records."""
    if len(dropped) > SHARE * of:
        places = ", ".join(dropped[:3]) + (", …" if len(dropped) > 3 else "")
        raise UserError(
            f"{len(dropped):,} of {of:,} records are longer than {max_length:,} tokens ({places}): "
            "too many to drop unasked",
            "raise data.max_length (up to the context of the model), or set data.overlong to drop or truncate",
        )


def counted(found: Iterable[Any], talk: Talk) -> Iterable[Any]:
    """What `found` yields, with a bar of how many went by."""
    with talk.bar("tokenizing", None, "records") as bar:
        for one in found:
            yield one
            bar.advance(1)


def _cut(
    doc_start: np.ndarray,
    texts: int,
    policies: tuple[str | None, str | None],
    max_length: int,
    places: list[str],
) -> Pieces:
    """Texts are split unless told otherwise; a conversation in two is not the same, so those are dropped."""
    lengths = np.diff(doc_start)
    if policies[1] is None:
        long = np.flatnonzero(lengths[texts:] > max_length) + texts
        refuse_many_dropped([places[doc] for doc in long], len(lengths) - texts, max_length)
    none = doc_start[:0]
    parts = [Pieces(none, none, none)]
    spans = ((0, texts, policies[0] or "split"), (texts, len(lengths), policies[1] or "drop"))
    for first, last, policy in spans:
        if policy == "drop":
            fit = np.flatnonzero(lengths[first:last] <= max_length) + first
            parts.append(Pieces(doc_start[fit], lengths[fit], fit, {"documents": last - first}))
        elif (lengths[first:last] > 1).any():
            part = cut(doc_start[first : last + 1], max_length, policy, lambda doc, n=first: places[n + doc])
            parts.append(replace(part, doc=part.doc + first))
    return _joined(parts)


def _joined(parts: list[Pieces]) -> Pieces:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    counts["too_short"] = 0  # the account tells of them, with their places
    return Pieces(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.doc for part in parts]),
        dict(counts),
        list(chain.from_iterable(part.examples for part in parts)),
    )


def _useful(pieces: Pieces, trained: np.ndarray) -> Pieces:
    """Without pieces that have no label."""
    kept = pieces.take(pieces.length > 1)
    kept = kept.take(labels_of(kept, trained) > 0)
    return replace(kept, counts=pieces.counts, examples=pieces.examples)


def _rows(pieces: Pieces, max_length: int, packing: bool) -> Any:
    return pack(pieces.length, max_length) if packing else unpacked(len(pieces))


def _layer(made: TalkRows, packing: bool) -> Callable[[Pieces], TalkRows]:
    def lay(pieces: Pieces) -> TalkRows:
        rows = _rows(pieces, made.max_length, packing)
        return replace(made, laid=Laid(made.laid.ids, pieces, rows, made.laid.trained))

    return lay


def require_data(data: Sequence[str], what: str) -> None:
    """Raise UserError if no data is named."""
    if not data:
        raise UserError(
            f"no data to {what}", f"name files with --data; formats: {one_of(['alpaca', 'messages'])} …"
        )
