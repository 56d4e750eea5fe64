"""`llmctl eval`: how well a model predicts the text in some files."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import eval_batches
from llmctl.data.packing import cut, pack
from llmctl.data.shards import open_shards
from llmctl.errors import UserError, named_in
from llmctl.evaluate.exact import exact_matches
from llmctl.evaluate.intervals import share_interval
from llmctl.evaluate.perplexity import score
from llmctl.kernels.device import Compute, pick_compute
from llmctl.kernels.threads import use_threads
from llmctl.model import LlmctlForCausalLM
from llmctl.model.open import open_model
from llmctl.recipe.schema import EvalRecipe, EvalSection
from llmctl.recipe.tune import SftData
from llmctl.stages.rows import read_rows
from llmctl.stages.text import (
    TextRows,
    encoder_of,
    fitting_tokenizer,
    pad_id_of,
    row_length,
    score_rows,
    scored_length,
    tell,
)
from llmctl.talk import Talk
from llmctl.tokenizer.choose import OWN, choose_template


@named_in("eval")
def run(recipe: EvalRecipe, talk: Talk) -> dict[str, Any]:
    """loss (nats per token), perplexity, bits_per_byte, tokens and bytes; or, of answers, see `_answers`.

    Documents longer than a row are split; every token but a document's first is predicted once.

    Raises UserError: no data, data that cannot be read, a model or tokenizer that cannot be loaded
    or do not fit each other.
    """
    settings = recipe.eval
    if not settings.data:
        raise UserError("no data to score", "name files with --data FILE")
    assert recipe.base is not None
    compute = pick_compute(recipe.device, settings.dtype, "eval.dtype")
    use_threads(settings.threads, "eval.threads", compute.device, talk)
    tokenizer = fitting_tokenizer(recipe.base)
    model = open_model(recipe.base, compute.dtype, compute.device)
    if settings.answers:
        length = row_length(settings.max_length, model.config.max_position_embeddings, "eval.max_length")
        return _answers(model, tokenizer, settings, compute, length, talk)
    length = scored_length(settings.max_length, model.config.spec, "eval.max_length", talk)
    shards = open_shards(settings.data, settings.text_field, encoder_of(tokenizer), settings.cache_dir, talk)
    pieces = cut(shards.doc_start, length, "split", shards.where)
    tell(shards, pieces, length, talk)
    text = TextRows(shards, pieces, pack(pieces.length, length), length)
    return score_rows(model, text, tokenizer, compute, settings.batch_size, settings.max_rows).figures()


def _answers(
    model: LlmctlForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: EvalSection,
    compute: Compute,
    length: int,
    talk: Talk,
) -> dict[str, Any]:
    """loss, perplexity and tokens of the answers in conversations, and exact_match.

    exact_match is the share of records whose first answer greedy decoding gives to the last token, its end
    included, with a 95 % interval; `matches` says it of each.
    """
    choice = choose_template(tokenizer, OWN)
    if choice.said:
        talk.say(choice.said)
    data = SftData(
        train=settings.data,
        text_field=settings.text_field,
        columns=settings.columns,
        overlong="truncate",
        packing=False,
    )
    rows = read_rows(settings.data, data, tokenizer, length, talk)
    pad = pad_id_of(tokenizer)
    batches = eval_batches(rows.laid, batch_size=settings.batch_size, pad_id=pad, max_rows=settings.max_rows)
    figures = score(model, batches, 0.0, compute).figures()
    found: dict[str, Any] = {name: figures[name] for name in ("loss", "perplexity", "tokens")}
    matches = exact_matches(model, rows.prompts(settings.max_rows), compute, settings.batch_size)
    if matches:
        low, high = share_interval(sum(matches), len(matches))
        share = sum(matches) / len(matches)
        found |= {"exact_match": share, "exact_match_low": low, "exact_match_high": high}
    return found | {"records": len(matches), "matches": [int(right) for right in matches]}
