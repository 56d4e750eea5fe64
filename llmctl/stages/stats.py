"""`llmctl data stats`: what a data set is like, and with a model, how long it is in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmctl.data.document import Account, Limit
from llmctl.data.formats import Example, examples
from llmctl.data.sources import total_bytes
from llmctl.data.statistics import Statistics, empty_inputs, in_batches
from llmctl.recipe.tune import SftRecipe
from llmctl.talk import Talk

if TYPE_CHECKING:
    from llmctl.stages.lengths import Lengths

MB = 1e6


def run(recipe: SftRecipe, talk: Talk) -> dict[str, Any]:
    """What `Statistics.report` says of every usable record, the account, and `tokens` if `base` is set.

    Says what was read, kept and dropped. Nothing is dropped for its length.

    Raises UserError: as `examples`; with a model as `prepare_base` and `Encoder.rows`.
    """
    data = recipe.data
    account = Account(noun="record")
    statistics = Statistics()
    lengths = None if recipe.base is None else _lengths(recipe, talk)
    limit = Limit(data.max_document_mb)
    found = _with_progress(examples(data.train, data.text_field, account, limit), data.train, account, talk)
    for batch in in_batches(found):
        for example in batch:
            statistics.add(example)
        if lengths is not None:
            lengths.add(batch)
    for sentence in [] if lengths is None else lengths.encoder.notes():
        account.note(sentence)
    for line in account.lines():
        talk.say(line)
    report = statistics.report() | {"empty_inputs": empty_inputs(statistics.sources, limit)}
    report["tokens"] = None if lengths is None else lengths.report(statistics.bytes)
    return report | {"account": account.to_json()}


def _lengths(recipe: SftRecipe, talk: Talk) -> Lengths:
    # torch, which takes seconds to import, is needed for nothing else here
    from llmctl.stages.encode import Encoder
    from llmctl.stages.inspect import base_of
    from llmctl.stages.lengths import Lengths

    base = base_of(recipe, talk)
    split = recipe.data.rewritten == "split"
    return Lengths(Encoder(base.tokenizer, recipe.data.mask_prompt, split), base.max_length)


def _with_progress(
    found: Iterator[Example], sources: list[str], account: Account, talk: Talk
) -> Iterator[Example]:
    size, done = total_bytes(sources), 0
    with talk.bar("reading", size and size / MB, "MB" if size else "records") as bar:
        for example in found:
            yield example
            bar.advance((account.input_bytes - done) / MB if size else 1)
            done = account.input_bytes
