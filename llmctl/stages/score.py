"""`llmctl score`: rank answers with a reward model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmctl.data.document import Account
from llmctl.data.formats import Example, examples
from llmctl.data.shapes import Labelled, Preference
from llmctl.errors import UserError, named_in
from llmctl.evaluate.intervals import share_interval
from llmctl.evaluate.scores import above, scores
from llmctl.kernels.device import pick_compute
from llmctl.kernels.threads import use_threads
from llmctl.model.classify import open_scorer
from llmctl.model.open import open_config
from llmctl.recipe.tune import ScoreRecipe
from llmctl.stages.encode import Encoder
from llmctl.stages.labelled import encoded_labelled
from llmctl.stages.pairs import Pair, encoded_pairs
from llmctl.stages.rows import OVERLONG, SHARE, counted, require_data
from llmctl.stages.text import open_tokenizer, refuse_mismatch, refuse_swapped_tokenizer, row_length
from llmctl.talk import Talk
from llmctl.tokenizer.choose import OWN, choose_template


@dataclass(frozen=True)
class Answer:
    """One answer as the model reads it.

    Args:
        ids: prompt and answer; `start` is where the answer begins.
        side: chosen or rejected of a pair, wanted or unwanted by its label, or empty.
    """

    place: str
    ids: list[int]
    start: int
    side: str = ""


def run(recipe: ScoreRecipe, talk: Talk) -> dict[str, Any]:
    """`rows`, the best first, with score, place, side and answer, and figures of what `Answer.side` allows.

    pairs, accuracy (with its 95 % interval) and margin of preferences, and shorter_wins, the accuracy of
    preferring the shorter answer; labelled, and auc, how often a wanted answer scores above an unwanted.

    Raises UserError: no data or none that can be scored, a model that is not a reward model.
    """
    settings = recipe.score
    require_data(settings.data, "score")
    assert recipe.base is not None
    compute = pick_compute(recipe.device, settings.dtype, "score.dtype")
    use_threads(settings.threads, "score.threads", compute.device, talk)
    config = open_config(recipe.base)  # a broken config.json would look like a broken tokenizer
    tokenizer = open_tokenizer(recipe.base)
    refuse_swapped_tokenizer(tokenizer, recipe.base)
    refuse_mismatch(tokenizer, config.vocab_size, recipe.base)
    model = open_scorer(recipe.base, compute.dtype, compute.device)
    choice = choose_template(tokenizer, OWN)
    if choice.said:
        talk.say(choice.said)
    length = row_length(settings.max_length, config.max_position_embeddings, "score.max_length")
    answers = read_answers(settings.data, tokenizer, length, talk, settings.columns)
    with talk.bar("scoring", len(answers), "answers") as bar:
        found = scores(model, [one.ids for one in answers], compute, settings.batch_size, bar.advance)
    rows = [
        {
            "score": score,
            "place": one.place,
            **({"side": one.side} if one.side else {}),
            "answer": tokenizer.decode(one.ids[one.start :], skip_special_tokens=True),
        }
        for one, score in zip(answers, found, strict=True)
    ]
    rows.sort(key=lambda row: -row["score"])
    return {
        "answers": len(rows),
        "mean_score": sum(found) / len(found),
        **figures(answers, found),
        "rows": rows,
    }


def figures(answers: list[Answer], found: list[float]) -> dict[str, Any]:
    """How well the scores agree with preferences and labels; the sides of a pair stand one after the other."""
    by_side: dict[str, list[float]] = {}
    lengths: dict[str, list[int]] = {}
    for one, score in zip(answers, found, strict=True):
        by_side.setdefault(one.side, []).append(score)
        lengths.setdefault(one.side, []).append(len(one.ids))
    told: dict[str, Any] = {}
    if "chosen" in by_side:
        pairs = list(zip(by_side["chosen"], by_side["rejected"], strict=True))
        right = sum(a > b for a, b in pairs)
        low, high = share_interval(right, len(pairs))
        told |= {
            "pairs": len(pairs),
            "accuracy": right / len(pairs),
            "accuracy_low": low,
            "accuracy_high": high,
            "margin": sum(a - b for a, b in pairs) / len(pairs),
            "shorter_wins": _shorter_wins(lengths["chosen"], lengths["rejected"]),
        }
    wanted, unwanted = by_side.get("wanted", []), by_side.get("unwanted", [])
    if wanted or unwanted:
        told["labelled"] = len(wanted) + len(unwanted)
    if wanted and unwanted:
        told["auc"] = above(wanted, unwanted)
    return told


def _shorter_wins(chosen: list[int], rejected: list[int]) -> float:
    return sum(0.5 if a == b else float(a < b) for a, b in zip(chosen, rejected, strict=True)) / len(chosen)


@named_in("score")
def read_answers(
    sources: list[str],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    talk: Talk,
    columns: dict[str, str] | None = None,
) -> list[Answer]:
    """Every answer of some sources, encoded as `llmctl reward` encodes it. None is cut: the end is what is read.

    Raises UserError: as `examples` and `Encoder.rows`; more than a tenth of the records is too long.
    """
    account, encoder = Account(noun="record"), Encoder(tokenizer)
    kinds: dict[type, list[Example]] = {}
    for example in counted(examples(sources, "text", account, columns=columns), talk):
        kind = type(example.shape) if isinstance(example.shape, Preference | Labelled) else object
        kinds.setdefault(kind, []).append(example)
    records = [
        *([_sides(pair) for pair in encoded_pairs(encoder, kinds.get(Preference, []))]),
        *_labelled(encoder, kinds.get(Labelled, [])),
        *_single(encoder, kinds.get(object, []), account),
    ]
    long = {record[0].place for record in records if max(len(one.ids) for one in record) > max_length}
    if len(long) > SHARE * len(records):
        raise UserError(
            f"{len(long):,} of {len(records):,} records are longer than {max_length:,} tokens, "
            f"as {min(long)}: too many to leave out",
            "raise score.max_length, or take those records out of the data",
        )
    for place in sorted(long):
        account.reject(OVERLONG.format(max_length), place)
    for sentence in encoder.notes():
        account.note(sentence)
    said = ", ".join(f"{count:,} {name}" for name, count in sorted(encoder.formats.items()))
    for line in [f"formats: {said}", *account.lines()]:
        talk.say(line)
    return [one for record in records if record[0].place not in long for one in record]


def _sides(pair: Pair) -> list[Answer]:
    both = (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
    return [Answer(pair.place, pair.prompt_ids + ids, len(pair.prompt_ids), side) for side, ids in both]


def _labelled(encoder: Encoder, found: list[Example]) -> Iterable[list[Answer]]:
    for pair, example in zip(encoded_labelled(encoder, found), found, strict=True):
        assert isinstance(example.shape, Labelled)
        side = "wanted" if example.shape.label else "unwanted"
        yield [Answer(pair.place, pair.prompt_ids + pair.chosen_ids, len(pair.prompt_ids), side)]


def _single(encoder: Encoder, found: list[Example], account: Account) -> Iterable[list[Answer]]:
    """Conversations up to the end of their last answer, as the answers of a pair end."""
    for row in encoder.rows(found):
        if not row.spans:
            account.reject(row.why, row.place)
            continue
        start, end = row.spans[-1]
        yield [Answer(row.place, row.ids[:end], start)]
